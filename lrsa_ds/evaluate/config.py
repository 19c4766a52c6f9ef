"""Every setting of an evaluation, typed; Hydra composes it from `conf/evaluate.yaml`."""

from dataclasses import dataclass, field
from typing import Any

from lrsa_ds.errors import require, require_one_of, require_whole
from lrsa_ds.layer_ranges import mappings, read_layers
from lrsa_ds.layer_settings import Layers
from lrsa_ds.layers import (
    AnyConfig,
    OfLRSA,
    cache_names,
    in_model,
    largest_first,
    settings_of,
    trained_turns,
    uniform,
)
from lrsa_ds.lrsa_config import LRSAConfig, require_retention
from lrsa_ds.settings.data import MADE_SOURCES, DataConfig
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.paths import expand_home
from lrsa_ds.settings.run import LogConfig

LAYERS = "cache.layers"
PREFILLS = ("dense", "chunked", "after")
OLD_SPELLINGS = {"full": "after"}
GENERATED = ("passkey", "needle", "needle_multikey", "variable_tracking", "common_words", "signature")
TASKS = (*GENERATED, "qa", "longbench", "ruler", "perplexity")


@dataclass(kw_only=True)
class CacheConfig:
    """The caches to compare.

    Args:
        sink_size, lag_size, selection, value_weight: None: those of the model's training, or else the defaults.
        retentions: shares of each partition that are kept, for the compressed caches.
        layers: more compressed caches, whose layers differ, as in `attention.layers`.
        prefill: "dense" keeps everything; "chunked" compresses during prefilling, chunk by chunk, as LRSA trains;
            "after" prefills densely and compresses afterwards, as most methods are evaluated ("full" is its old name).
    """

    sink_size: int | None = None
    lag_size: int | None = None
    selection: str | None = None
    value_weight: float | None = None
    retentions: list[float] = field(default_factory=lambda: [0.25, 0.125])
    layers: Any = None
    prefill: list[str] = field(default_factory=lambda: ["dense", "chunked"])

    def __post_init__(self):
        require(self.prefill != [], f"cache.prefill=[] is not valid: choose among {', '.join(PREFILLS)}.")
        self.prefill = list(dict.fromkeys(OLD_SPELLINGS.get(prefill, prefill) for prefill in self.prefill))
        for prefill in self.prefill:
            require_one_of("cache.prefill", prefill, PREFILLS)
        for retention in self.retentions:
            require_retention("cache.retentions", retention)
        differing = [read_layers(layers, LAYERS) for layers in mappings(LAYERS, self.layers)]
        require(
            self.prefill == ["dense"] or bool(self.retentions or differing),
            "cache.retentions=[] is not valid: give numbers from 0 to 1, cache.layers, or cache.prefill=[dense].",
        )
        if self.sink_size is not None:
            require_whole("cache.sink_size", self.sink_size, 0)
        if self.lag_size is not None:
            require_whole("cache.lag_size", self.lag_size, 2)

    def differing(self, trained: dict | None, model: Layers) -> dict[str, AnyConfig]:
        """The caches whose layers differ, by name: those that a model was trained with, and those of `layers`.

        Raises:
            LRSAError: `layers` is not for the model.
        """
        own = [self.caches(each.saved()) for each in largest_first(trained_turns(trained))] if trained else []
        found = [config for config in own if len(config.layers) > 1]
        base = self._layer((trained or {}).get("layers", [trained])[0], 1.0)
        for layers in mappings(LAYERS, self.layers):
            values = read_layers(layers, LAYERS).of_each(model)
            found.append(uniform([settings_of(value, base) for value in values]))
        found = list(dict.fromkeys(in_model(config, model) for config in found))
        return dict(zip(cache_names(found), found, strict=True))

    def caches(self, trained: dict | None) -> OfLRSA:
        """What the compressed caches have in common, for a model trained with the settings `trained`, if with any.

        Retentions are those of the training where its layers differ, and else 1.
        """
        if trained is None or "layers" not in trained:
            return self.attention(trained, 1.0)
        return uniform([self._layer(layer, layer["retention"]) for layer in trained["layers"]])

    def attention(self, trained: dict | None, retention: float) -> OfLRSA:
        """The cache of one retention."""
        if "layers" in (trained or {}):
            return self.caches(trained).at_retention(retention)
        return self._layer(trained, retention)

    def _layer(self, trained: dict | None, retention: float) -> LRSAConfig:
        keys = ("sink_size", "lag_size", "selection", "value_weight")
        given = {key: value for key in keys if (value := getattr(self, key)) is not None}
        known = {key: value for key, value in (trained or {}).items() if key in keys}
        if given.get("selection", known.get("selection")) != known.get("selection"):
            known.pop("value_weight", None)  # it belongs to the rule of the training
        return LRSAConfig(**known | given, retention=retention)


@dataclass(kw_only=True)
class EvaluateConfig:
    """A complete evaluation. The order of the fields is the order of `config.yaml`.

    Args:
        telemetry: whether to measure what each layer loses under the smallest cache, instead of answers.
        telemetry_greedy: number of layers to choose greedily to leave dense.
    """

    run_name: str = "evaluate"
    plugins: list[str] = field(default_factory=list)
    seed: int = 0
    output_dir: str | None = None
    overwrite: bool = False
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    tasks: list[str] = field(default_factory=lambda: list(GENERATED))
    lengths: list[int] = field(default_factory=lambda: [4096])
    num_samples: int = 20
    num_depths: int = 5
    telemetry: bool = False
    telemetry_greedy: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    longbench: str | None = None
    ruler: str | None = None
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        expand_home(self, "output_dir", "longbench", "ruler")
        require_whole("seed", self.seed, 0)
        require_whole("num_samples", self.num_samples, 1)
        require_whole("num_depths", self.num_depths, 1)
        require_whole("telemetry_greedy", self.telemetry_greedy, 0)
        require(
            self.telemetry or self.telemetry_greedy == 0,
            "telemetry_greedy has no effect without telemetry: add telemetry=true.",
        )
        require(
            not self.telemetry or set(self.tasks) != {"perplexity"},
            "telemetry=true measures answers, and the task perplexity has none: add another task.",
        )
        require(self.tasks != [], f"tasks=[] is not valid: choose among {', '.join(TASKS)}.")
        require(self.lengths != [], "lengths=[] is not valid: give numbers of tokens.")
        for task in self.tasks:
            require_one_of("tasks", task, TASKS)
        for length in self.lengths:
            require_whole("lengths", length, 64)
        for key in ("longbench", "ruler"):
            require(
                (key in self.tasks) == (getattr(self, key) is not None),
                f"the task {key} needs {key}=PATH, its JSONL files, and {key} is read only for the task {key}.",
            )
        require(
            ("qa" in self.tasks) == (self.data.source not in MADE_SOURCES),
            "the task qa needs data=files or data=hub, and data are read only for the task qa.",
        )
        require(
            not any(source.makes_contexts for source in [self.data, *map(self.data.of_source, self.data.sources)])
            or self.data.source in MADE_SOURCES,
            "contexts are generated for training only, and the task qa asks the rows: leave out "
            "data.make_contexts=true, and in a mixture the sources that generate contexts.",
        )
        require(
            "perplexity" not in self.tasks or self.cache.prefill != ["after"],
            "perplexity needs cache.prefill to hold dense or chunked: a cache that is compressed after the prompt has "
            "nothing left to predict.",
        )
