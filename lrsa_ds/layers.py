"""Settings layer by layer: one `LRSAConfig` for each layer of a model, beside layers of other kinds.

`attention.layers` maps layers ("3 7 9-11", "2-" up to the last one, "rest") to a retention, 1.0 for dense attention, to
several settings, or to None for those of the run; see `read_layers`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lrsa_ds.errors import require
from lrsa_ds.labels import retention_name
from lrsa_ds.layer_ranges import read_layers, written_layers
from lrsa_ds.layer_settings import Layers, LayerSettings, ModelLayers
from lrsa_ds.lrsa_config import LRSAConfig

TURNS = "turns"  # key in the settings of a saved model: all settings that it was trained with


@dataclass(frozen=True)
class LayeredConfig:
    """One `LRSAConfig` for each layer of a model; usable like one for all layers."""

    layers: tuple[LRSAConfig, ...]

    def at_layer(self, index: int) -> LRSAConfig:
        require(
            index < len(self.layers),
            f"the settings are for {len(self.layers)} layers, and the model has more: make them for this model, with "
            "lrsa_ds.apply_lrsa(model, config, layers).",
        )
        return self.layers[index]

    @property
    def share_kept(self) -> float:
        """Mean over the layers of the share of a partition that is kept."""
        return sum(config.share_kept for config in self.layers) / len(self.layers)

    @property
    def retention(self) -> float:
        return self.share_kept

    @property
    def is_dense(self) -> bool:
        return all(config.is_dense for config in self.layers)

    @property
    def _compressing(self) -> list[LRSAConfig]:
        return [config for config in self.layers if not config.is_dense] or list(self.layers)

    @property
    def dense_prefix_size(self) -> int:
        """Tokens of a document before any layer drops any."""
        return min(config.dense_prefix_size for config in self._compressing)

    @property
    def sink_size(self) -> int:
        """The largest value among layers that are not dense."""
        return max(config.sink_size for config in self._compressing)

    @property
    def lag_size(self) -> int:
        """The smallest value among layers that are not dense."""
        return min(config.lag_size for config in self._compressing)

    def at_retention(self, retention: float) -> "OfLRSA":
        """These settings with another retention, except in dense layers; 1.0 is dense attention.

        At its own mean share kept it returns itself.
        """
        if retention == self.share_kept:
            return self
        return uniform([c if c.is_dense else c.at_retention(retention) for c in self.layers])

    def saved(self) -> dict[str, Any]:
        """The settings as a saved model remembers them; `from_saved` reads them."""
        return {"layers": [config.saved() for config in self.layers]}


OfLRSA = LRSAConfig | LayeredConfig  # what is written, and what a model remembers


@dataclass(frozen=True)
class MixedConfig:
    """The settings of a model with layers of other kinds; made by `in_model`, and of use wherever the others are.

    What it says of retention and sizes is that of the layers that LRSA takes.

    Args:
        of_lrsa: the settings of these layers, in their order.
    """

    of_lrsa: OfLRSA
    model: ModelLayers

    @property
    def layers(self) -> tuple[LayerSettings, ...]:
        """The settings of each layer; of one that attends to the keys of another, that it has none."""
        return tuple(self._own(index) for index in range(len(self.model)))

    def at_layer(self, index: int) -> LayerSettings:
        """What a layer attends by: its settings, or those of the layer whose keys and values it attends to."""
        return self._own(self.model.source(index))

    def _own(self, index: int) -> LayerSettings:
        other = self.model.others[index]
        if other is not None:
            return replace(other, backend=self.of_lrsa.at_layer(0).backend)
        return self.of_lrsa.at_layer(self.model.taken.index(index))

    @property
    def written(self) -> OfLRSA:
        """The settings without the layers of other kinds: these stand in the configuration of the model."""
        taken = self.model.taken
        each = [self.of_lrsa.at_layer(taken.index(i) if i in taken else 0) for i in range(len(self.model))]
        return uniform(each)

    @property
    def share_kept(self) -> float:
        return self.of_lrsa.share_kept

    @property
    def retention(self) -> float:
        return self.of_lrsa.retention

    @property
    def is_dense(self) -> bool:
        """Whether the layers that LRSA takes keep everything."""
        return self.of_lrsa.is_dense

    @property
    def dense_prefix_size(self) -> int:
        return self.of_lrsa.dense_prefix_size

    @property
    def sink_size(self) -> int:
        return self.of_lrsa.sink_size

    @property
    def lag_size(self) -> int:
        return self.of_lrsa.lag_size

    def at_retention(self, retention: float) -> "MixedConfig":
        return replace(self, of_lrsa=self.of_lrsa.at_retention(retention))

    def saved(self) -> dict[str, Any]:
        return self.written.saved()


AnyConfig = OfLRSA | MixedConfig


def of_lrsa(config: AnyConfig) -> OfLRSA:
    """The settings of the layers that LRSA takes, in their order."""
    return config.of_lrsa if isinstance(config, MixedConfig) else config


def source_of(config: AnyConfig, layer: int) -> int:
    """The layer whose keys and values a layer attends to: an earlier one that shares them, or itself."""
    return config.model.source(layer) if isinstance(config, MixedConfig) else layer


def in_model(config: AnyConfig, model: Layers) -> AnyConfig:
    """The settings of every layer of a model: `config` where LRSA takes it, and its own where it is of another kind."""
    model = ModelLayers.of(model)
    config = config.written if isinstance(config, MixedConfig) else config
    if len(model.taken) == len(model):
        return config
    return MixedConfig(uniform([config.at_layer(index) for index in model.taken]), model)


def each_in_model(configs: Iterable[AnyConfig], model: Layers | None) -> tuple[AnyConfig, ...]:
    """`in_model` of each of them; unchanged for None, a model whose layers LRSA all takes."""
    return tuple(config if model is None else in_model(config, model) for config in configs)


def uniform(configs: Sequence[LRSAConfig]) -> OfLRSA:
    """One configuration for all layers if they are equal, else one for each layer."""
    return configs[0] if len(set(configs)) == 1 else LayeredConfig(tuple(configs))


def from_saved(settings: Mapping[str, Any]) -> OfLRSA:
    """Reads the output of `saved` of either kind; models of the first release have one configuration for all layers."""
    if "layers" not in settings:
        return LRSAConfig(**{name: value for name, value in settings.items() if name != TURNS})
    return uniform([LRSAConfig(**layer) for layer in settings["layers"]])


def saved_turns(configs: Sequence[AnyConfig]) -> dict[str, Any]:
    """The settings to save in a model that was trained with these in turn: those of the smallest cache, and all."""
    turns = list(dict.fromkeys(configs))
    smallest = smallest_of(turns).saved()
    return smallest if len(turns) == 1 else smallest | {TURNS: [config.saved() for config in turns]}


def trained_turns(settings: Mapping[str, Any]) -> list[OfLRSA]:
    """All settings that a model was trained with, from its saved settings, in the order of their use."""
    return [from_saved(turn) for turn in settings.get(TURNS, [settings])]


def largest_first(configs: Iterable[AnyConfig]) -> list[AnyConfig]:
    """Sorted by the size of their caches after a long document."""
    return sorted(configs, key=lambda config: (-config.share_kept, -config.lag_size))


def smallest_of(configs: Iterable[AnyConfig]) -> AnyConfig:
    return largest_first(configs)[-1]


def resolve(config: AnyConfig, layers: Mapping[Any, Any] | None, model: Layers) -> AnyConfig:
    """The settings of each of the model's layers.

    Args:
        config: settings of layers that `layers` does not change.
        layers: layers mapped to other settings; see `read_layers`.

    Raises:
        LRSAError: `layers` is not valid, or not for such a model.
    """
    model = ModelLayers.of(model)
    config = config.written if isinstance(config, MixedConfig) else config
    if not layers:
        require(
            len(config.layers) in (1, len(model)),
            f"the settings are for {len(config.layers)} layers, and the model has {len(model)}.",
        )
        return in_model(config, model)
    values = read_layers(layers).of_each(model)
    return in_model(uniform([settings_of(value, config.at_layer(layer)) for layer, value in enumerate(values)]), model)


def settings_of(value: Any, base: LRSAConfig) -> LRSAConfig:
    """The settings of a layer for which `value` is written (see `read_layers`), where all others have `base`."""
    if isinstance(value, LRSAConfig):
        return value
    if isinstance(value, Mapping):
        return replace(base, **value)
    return base if value is None else base.at_retention(value)


def describe(config: AnyConfig, one: Callable[[LRSAConfig], str] = LRSAConfig.said) -> str:
    """Such as "retention 0.125", or "layers 0-1 dense, 2-27 retention 0.1; mean share kept 0.164".

    Args:
        one: describes the settings of a layer that LRSA takes.
    """
    each = [one(layer) if isinstance(layer, LRSAConfig) else layer.said() for layer in config.layers]
    if len(set(each)) == 1:
        return each[0]
    parts = [
        f"{written_layers(i for i, said in enumerate(each) if said == kind)} {kind}" for kind in dict.fromkeys(each)
    ]
    share = f"; mean share kept {config.share_kept:.3g}" if isinstance(of_lrsa(config), LayeredConfig) else ""
    return f"layers {', '.join(parts)}{share}"


def cache_names(configs: Sequence[AnyConfig]) -> list[str]:
    """Different names for tables, such as "1/8", or "6 dense + 24 window" by the numbers of layers."""
    names = [_cache_name(config) for config in configs]
    for more in (lambda place: f", L = {configs[place].lag_size}", lambda place: f" ({place + 1})"):
        count = Counter(names)
        names = [name + more(place) if count[name] > 1 else name for place, name in enumerate(names)]
    return names


def _cache_name(config: AnyConfig) -> str:
    config = of_lrsa(config)
    if isinstance(config, LRSAConfig):
        return retention_name(config.retention)
    count = Counter(layer.share_kept for layer in config.layers)
    words = {1.0: "dense", 0.0: "window"}
    kinds = [
        f"{count[share]} {words.get(share, f'at {retention_name(share)}')}" for share in sorted(count, reverse=True)
    ]
    return " + ".join(kinds)
