"""Every setting of a run, typed, with its limits checked where it is declared.

`TrainConfig` is a whole run; Hydra composes it from `conf/` and `typed_config` turns what Hydra composed into it, so
that a typo or a wrong type ends the run in one sentence before any process group starts.
"""

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lrsa_ds.errors import LRSAError, all_of, noting, require, require_one_of, require_whole
from lrsa_ds.layers import AnyConfig, close_ranges, describe, read_ranges, uniform
from lrsa_ds.lrsa_config import LRSAConfig, require_retention
from lrsa_ds.registry import EXCHANGES

# Our names of the columns of a row, see lrsa_ds/data/shapes.py.
COLUMNS = ("messages", "conversations", "tools", "system", "prompt", "completion", "instruction", "input", "output")
COLUMNS += ("context", "question", "answer", "answers", "answer_start", "text", "input_ids", "labels", "task")


def require_paths(key: str, value: Any) -> None:
    paths = value if isinstance(value, list) else [value]
    valid = value is None or (paths != [] and all(isinstance(path, str) for path in paths))
    require(valid, f"{key}={value!r} is not valid: give a file, a directory or a glob pattern, or a list of these.")


def expand_home(settings: Any, *names: str) -> None:
    """Replaces the ~ at the beginning of these settings, paths or lists of paths, by the directory it stands for."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str):
            setattr(settings, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(settings, name, [os.path.expanduser(path) for path in value])


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters through PEFT; rank 0 trains the model itself.

    Args:
        targets: "all-linear", or the names of layers, separated by commas, such as "q_proj,v_proj".
        export: "merged" (a model as any other) or "adapter" (the adapters alone, in PEFT's format).
    """

    rank: int = 0
    alpha: float = 32.0
    targets: str = "all-linear"
    export: str = "merged"

    def __post_init__(self):
        require_whole("model.lora.rank", self.rank, 0)
        require(self.alpha > 0, f"model.lora.alpha={self.alpha} is not valid: give a number above 0.")
        require_one_of("model.lora.export", self.export, ("merged", "adapter"))


@dataclass(kw_only=True)
class ModelConfig:
    """Where the model comes from: a hub name, a local directory, a GGUF file, or random weights; what is trained."""

    name: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    random: dict[str, Any] | None = field(default_factory=dict)  # an empty one is none
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    liger_kernel: bool = False
    freeze: list[str] = field(default_factory=list)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        expand_home(self, "name", "tokenizer")
        self.random = self.random or None
        require(
            self.lora.rank == 0 or not self.freeze,
            "model.freeze has no effect beside model.lora.rank, which trains the adapters alone: set one of the two.",
        )
        require_one_of("model.dtype", self.dtype, ("auto", "bf16", "fp32"))
        require(
            (self.name is None) != (self.random is None),
            "model: set exactly one of model.name (a hub name or a local directory) and model.random "
            "(an architecture with random weights, such as {model_type: qwen2, ...}).",
        )
        require(self.gguf_file is None or self.name is not None, "model.gguf_file needs model.name, its directory.")
        if self.random is not None:
            require("model_type" in self.random, "model.random needs the key model_type, such as llama or qwen2.")
            require(self.tokenizer is not None, "model.random needs model.tokenizer: a name, a directory, or 'bytes'.")


@dataclass(kw_only=True)
class AttentionConfig:
    """LRSA or dense attention in training; `sink_size` and `lag_size` also serve the evaluation of a dense run.

    Args:
        retention: a number, or a list of which each step takes the next one.
        layers: from ranges of layers to a retention of their own, 1.0 for dense attention, or None for `retention`; see
            `lrsa_ds.layers`. `resolved` is needed before the settings reach a model.
    """

    kind: str = "lrsa"
    sink_size: int = 16
    lag_size: int = 1024
    retention: Any = 0.125
    selection: str = "lagkv"
    value_weight: float = 1.0
    layers: dict[Any, Any] = field(default_factory=dict)
    backend: str = "auto"

    def __post_init__(self):
        require_one_of("attention.kind", self.kind, ("lrsa", "dense"))
        require(
            self.kind == "lrsa" or not self.layers,
            "attention.layers has no effect under dense attention: use attention=lrsa.",
        )
        self._ranges = read_ranges(self.layers)
        require(self.retentions != [], "attention.retention=[] is not valid: give a number in (0, 1], or a list.")
        for step in range(len(self.retentions)):
            self.at_step(step)
        require(
            self.kind == "lrsa" or self.retentions == [1.0],
            f"attention.retention={self.retention!r} has no effect under dense attention: use attention=lrsa.",
        )

    @property
    def retentions(self) -> list:
        return list(self.retention) if isinstance(self.retention, (list, tuple)) else [self.retention]

    def resolved(self, num_layers: int) -> "AttentionConfig":
        """The same for a model of so many layers, each of which has an entry in `layers` if any has.

        Raises:
            LRSAError: `layers` leaves a layer out, or names one beyond the model.
        """
        if not self.layers:
            return self
        ranges = close_ranges(self._ranges, num_layers)
        return replace(self, layers={str(i): value for first, last, value in ranges for i in range(first, last + 1)})

    def at_step(self, step: int) -> AnyConfig:
        """The attention of optimizer step `step` (counted from 0): a list of retentions is taken in turn.

        A step at 1.0 is dense in every layer. Otherwise each layer has the retention that `layers` gives it, or that of
        the step.
        """
        retention = self.retentions[step % len(self.retentions)]
        return self._by_layer(retention, lambda own: retention if own is None else own)

    def with_retention(self, retention: float) -> AnyConfig:
        """The attention under another cache: layers that `layers` makes dense stay so, unless all are to be dense."""
        return self._by_layer(retention, lambda own: 1.0 if own == 1 else retention)

    def evaluated(self, retentions: list[float]) -> list[tuple[float, AnyConfig]]:
        """The caches of an evaluation with their names: these retentions, and what is trained where layers differ.

        The latter is named by the mean share that it keeps.
        """
        caches = [(retention, self.with_retention(retention)) for retention in retentions]
        trained = self.at_step(0)
        is_new = self.layers and trained not in [config for _, config in caches]
        return [*caches, (trained.share_kept, trained)] if is_new else caches

    def described(self) -> str:
        """Such as "retention 0.125"; with `layers` also what each layer keeps, step by step."""
        if not self.layers:
            return f"retention {self.retentions[0] if len(self.retentions) == 1 else self.retentions}"
        return ", then ".join(dict.fromkeys(describe(self.at_step(step)) for step in range(len(self.retentions))))

    def _by_layer(self, retention: float, choose: Callable[[float | None], float]) -> AnyConfig:
        values = [choose(own) for *_, own in self._ranges] if self._ranges and retention != 1 else [retention]
        return uniform([self._config(value) for value in values])

    def _config(self, retention: float) -> LRSAConfig:
        return LRSAConfig(
            sink_size=self.sink_size,
            lag_size=self.lag_size,
            retention=retention,
            selection=self.selection,
            value_weight=self.value_weight,
            backend=self.backend,
        )


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised; `weight`, `temperature` and `teacher` are those of distillation.

    Args:
        kind: a name in the table of `lrsa_ds.objectives`.
        weight: share of the divergence from the teacher in the loss; the rest is that of the target loss.
        teacher: "self" (the dense pass of the model as it is) or "start" (that of its start weights).
    """

    kind: str = "target_loss"
    weight: float = 0.5
    temperature: float = 1.0
    teacher: str = "self"

    def __post_init__(self):
        require(
            0 < self.weight <= 1,
            f"objective.weight={self.weight} is not valid: give a number above 0 and at most 1 "
            "(objective=target_loss trains without a teacher).",
        )
        require(self.temperature > 0, f"objective.temperature={self.temperature} is not valid: give a number above 0.")
        require_one_of("objective.teacher", self.teacher, ("self", "start"))


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture: files (`path`) or a data set of the hub (`name`), and how often its rows are drawn."""

    path: Any = None
    validation_path: Any = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    weight: float | None = None

    def __post_init__(self):
        require(
            (self.path is None) != (self.name is None), "data.sources: give path or name in each source, one of both."
        )
        weight = self.weight
        require(weight is None or weight > 0, f"data.sources: weight={weight} is not valid: give a number above 0.")


def _source(value: Any) -> SourceConfig:
    """A source as the configuration has it, with its keys and their types checked."""
    if isinstance(value, SourceConfig):
        return value
    require(isinstance(value, dict), f"data.sources: {value!r} is not valid: give objects such as {{path: a.jsonl}}.")
    for key in value:
        require_one_of("data.sources: key", key, tuple(f.name for f in fields(SourceConfig)))
    try:
        return cast(SourceConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), value)))
    except OmegaConfBaseException as error:
        raise LRSAError(f"data.sources: {error.full_key}: {str(error.msg).splitlines()[0]}.") from error


@dataclass(kw_only=True)
class DataConfig:
    """Where examples come from and how they are laid out; see README, "Your own data"."""

    source: str = "stdlib_qa"
    sources: list[Any] = field(default_factory=list)
    path: Any = None
    validation_path: Any = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    streaming: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=lambda: ["signature", "passkey", "lookup"])
    num_examples: int = 4096
    context_length: int | None = None
    chat_template: bool = True
    on_bad_row: str = "error"
    too_long: str = "cut"
    report: str = "sample"
    num_workers: int = 1

    def __post_init__(self):
        require_one_of("data.source", self.source, ("stdlib_qa", "files", "hub", "mixture"))
        self._check_sources()
        require_one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        require_one_of("data.too_long", self.too_long, ("cut", "drop", "error"))
        require_one_of("data.report", self.report, ("sample", "all"))
        for key in ("path", "validation_path"):
            require_paths(f"data.{key}", getattr(self, key))
        expand_home(self, "path", "validation_path", "name")
        require_whole("data.num_examples", self.num_examples, 1)
        require(
            self.num_workers in (0, 1),
            f"data.num_workers={self.num_workers!r} is not valid: give 0 (prepare sequences in the training process) "
            "or 1 (in another one); more would prepare the same sequences twice.",
        )
        for ours, theirs in self.columns.items():
            require_one_of("data.columns", ours, COLUMNS)
            require(
                isinstance(theirs, str),
                f"data.columns={{{ours}: {theirs!r}}} is not valid: give the name of a column, such as "
                f"{{{ours}: passage}}.",
            )
        require(
            self.source == "files" or (self.path is None and self.validation_path is None),
            "data.path and data.validation_path are read only with data=files: add data=files.",
        )
        require(
            self.source == "hub" or self.name is None,
            "data.name names a hub data set and is read only with data=hub: add data=hub.",
        )
        require(
            self.source == "hub" or (self.subset is None and self.validation_split is None),
            "data.subset and data.validation_split are read only with data=hub: add data=hub.",
        )
        require(self.source != "files" or self.path is not None, "data=files needs data.path, a JSONL or Parquet file.")
        require(self.source != "hub" or self.name is not None, "data=hub needs data.name, a data set of the hub.")
        for task in self.tasks:
            require_one_of("data.tasks", task, ("signature", "passkey", "lookup"))
        require(self.tasks != [], "data.tasks=[] is not valid: choose among signature, passkey, lookup.")
        if self.context_length is not None:
            require_whole("data.context_length", self.context_length, 64)

    def _check_sources(self) -> None:
        self.sources = [_source(source) for source in self.sources]
        require(
            (self.source == "mixture") == (self.sources != []),
            "data=mixture needs data.sources, which nothing else reads: such as '[{path: a.jsonl}, {path: b.jsonl}]'.",
        )
        require(
            len({source.weight is None for source in self.sources}) < 2,
            "data.sources: give a weight in every source, or in none: then every row is seen once in an epoch.",
        )
        require(
            self.source != "mixture" or not self.streaming,
            "data=mixture needs the numbers of rows, which data.streaming=true does not know: set it to false.",
        )
        for source in self.sources:
            self.of_source(source)

    def of_source(self, source: SourceConfig) -> "DataConfig":
        """These settings for one source of the mixture alone."""
        own = {f.name: getattr(source, f.name) for f in fields(source) if f.name != "weight"}
        own["columns"] = source.columns or self.columns
        return replace(self, source="hub" if source.path is None else "files", sources=[], **own)


@dataclass(kw_only=True)
class ParallelConfig:
    """How the ranks are arranged; `timeout` is in seconds, 0 for none."""

    sp_size: int = 1
    exchange: str = "gather_kept"
    timeout: float = 1800.0

    def __post_init__(self):
        require_whole("parallel.sp_size", self.sp_size, 1)
        self.exchange = EXCHANGES.name_of(self.exchange)
        require(self.timeout >= 0, f"parallel.timeout={self.timeout} is not valid: give seconds, or 0 for none.")


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO: what is sharded over the ranks, and what is moved to host memory."""

    stage: int = 3
    offload_optimizer: str = "none"
    offload_param: str = "none"
    gather_layers: bool = True
    reduce_bucket_size: int = 50_000_000
    overlap_comm: bool = True

    def __post_init__(self):
        require_one_of("zero.stage", self.stage, (1, 2, 3))
        require_one_of("zero.offload_optimizer", self.offload_optimizer, ("none", "cpu"))
        require_one_of("zero.offload_param", self.offload_param, ("none", "cpu"))
        require_whole("zero.reduce_bucket_size", self.reduce_bucket_size, 1)
        require(
            self.offload_param == "none" or self.stage == 3,
            f"zero.offload_param=cpu needs zero.stage=3, and zero.stage is {self.stage}.",
        )


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to `min_lr_ratio` of the peak."""

    lr: float = 1e-5
    num_steps: int = 1000
    num_epochs: float | None = None
    warmup_steps: int = 20
    grad_accum: int = 1
    micro_batch: int = 1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0
    on_nan: str = "stop"

    def __post_init__(self):
        require(self.lr > 0, f"optim.lr={self.lr} is not valid: give a number above 0.")
        require_whole("optim.num_steps", self.num_steps, 1)
        epochs = self.num_epochs
        require(
            epochs is None or epochs > 0, f"optim.num_epochs={epochs} is not valid: give a number above 0, or null."
        )
        require_whole("optim.warmup_steps", self.warmup_steps, 0)
        require_whole("optim.grad_accum", self.grad_accum, 1)
        require_whole("optim.micro_batch", self.micro_batch, 1)
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is not valid: give at least 0.")
        require(self.grad_clip >= 0, f"optim.grad_clip={self.grad_clip} is not valid: give at least 0 (0 is off).")
        require_one_of("optim.on_nan", self.on_nan, ("stop", "skip"))
        require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio={self.min_lr_ratio} is not valid: give 0 to 1.")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, f"optim.{key}={value} is not valid: give at least 0 and below 1.")


@dataclass(kw_only=True)
class EvalConfig:
    """Answers under the caches that inference would keep: before, after, and every so many steps (0: never).

    Args:
        telemetry: whether to measure, before and after, what each layer loses under the smallest of the caches.
        telemetry_examples: over how many examples.
        telemetry_greedy: how many layers to choose, one after the other, that are better left dense.
    """

    before: bool = True
    after: bool = True
    every: int = 0
    num_examples: int = 48
    allow_fewer: bool = False
    retentions: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25, 0.125])
    telemetry: bool = False
    telemetry_examples: int = 16
    telemetry_greedy: int = 0

    def __post_init__(self):
        require_whole("eval.num_examples", self.num_examples, 1)
        require_whole("eval.telemetry_examples", self.telemetry_examples, 1)
        require_whole("eval.telemetry_greedy", self.telemetry_greedy, 0)
        require(
            self.telemetry or self.telemetry_greedy == 0,
            "eval.telemetry_greedy has no effect without telemetry: add eval.telemetry=true.",
        )
        require(
            not self.telemetry or self.before or self.after,
            "eval.telemetry=true measures when eval.before or eval.after does, and both are false: set one to true.",
        )
        require_whole("eval.every", self.every, 0)
        require(self.retentions != [], "eval.retentions=[] is not valid: give numbers in (0, 1].")
        for retention in self.retentions:
            require_retention("eval.retentions", retention)


@dataclass(kw_only=True)
class LogConfig:
    """Where metrics go besides `metrics.jsonl`."""

    wandb: str = "auto"
    project: str = "lrsa-ds"
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    progress: bool = True
    profile_steps: list[int] = field(default_factory=list)

    def __post_init__(self):
        first_and_last = self.profile_steps
        require(
            first_and_last == [] or (len(first_and_last) == 2 and 1 <= first_and_last[0] <= first_and_last[1]),
            f"log.profile_steps={first_and_last} is not valid: give the first and the last step, such as [3,5], or [].",
        )
        require_one_of("log.wandb", self.wandb, ("auto", "online", "offline", "disabled"))


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is left on disk, on the way (every so many steps, 0: never) and at the end."""

    every: int = 0
    keep: int = 2
    resume: str = "auto"
    write: str = "auto"
    best: bool = False
    export: bool = True
    overwrite: bool = False
    accept_data_change: bool = False

    def __post_init__(self):
        require_whole("checkpoint.every", self.every, 0)
        require_whole("checkpoint.keep", self.keep, 1)
        require_one_of("checkpoint.resume", self.resume, ("auto", "never"))
        require_one_of("checkpoint.write", self.write, ("auto", "background", "wait"))


@dataclass(kw_only=True)
class TrainConfig:
    """A whole run. The order of the fields is the order of `config.yaml`."""

    run_name: str = "train"
    procedure: str = "qa"
    seq_len: int = 8192
    seed: int = 0
    output_dir: str | None = None
    activation_checkpointing: bool = True
    loss_chunk_size: int = 2048
    model: ModelConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        expand_home(self, "output_dir", "procedure")
        require_whole("seq_len", self.seq_len, 64)
        require_whole("seed", self.seed, 0)
        require_whole("loss_chunk_size", self.loss_chunk_size, 1)
        for retention in self.eval.retentions:
            self.attention.with_retention(retention)
        require(
            not self.checkpoint.best or self.eval.every > 0,
            "checkpoint.best=true needs eval.every, the steps between two evaluations to choose among.",
        )
        context_length = self.data.context_length
        require(
            context_length is None or context_length <= self.seq_len,
            f"data.context_length={context_length} is longer than seq_len={self.seq_len}: give at most seq_len.",
        )
        self._check_that_lrsa_does_something()
        require(
            not self.eval.telemetry or self.parallel.sp_size == 1,
            f"eval.telemetry=true needs whole sequences on each rank, and parallel.sp_size is {self.parallel.sp_size}: "
            "leave it at 1, or measure the exported model with launch/evaluate.py telemetry=true.",
        )
        require(
            self.optim.num_epochs is None or not self.data.streaming,
            "optim.num_epochs needs the number of rows, which data.streaming=true does not know: set optim.num_steps.",
        )
        require(
            self.optim.warmup_steps <= self.optim.num_steps,
            f"optim.warmup_steps={self.optim.warmup_steps} is more than optim.num_steps={self.optim.num_steps}.",
        )

    def _check_that_lrsa_does_something(self) -> None:
        """Refuses LRSA on documents that are never long enough to be compressed: it would be dense attention."""
        steps = map(self.attention.at_step, range(len(self.attention.retentions)))
        compressed = [attention for attention in steps if not attention.is_dense]
        if not compressed:
            return
        key, length = "seq_len", self.seq_len
        if self.data.source == "stdlib_qa" and self.data.context_length is not None:
            key, length = "data.context_length", self.data.context_length
        require_compression(key, length, compressed[0], "attention", "attention=dense")


def require_compression(key: str, length: int, config: AnyConfig, group: str, instead: str) -> None:
    """Raises LRSAError if no document of `length` tokens would be compressed; names `key` and what would help.

    Args:
        group: where sink_size and lag_size are set.
        instead: the setting that does the same and says so.
    """
    least = config.dense_prefix_size + 1
    most = (length - 1 - config.sink_size) // 2
    lag = f", {group}.lag_size of at most {most}" if most >= 2 else ""
    require(
        length >= least,
        f"{key}={length} is too short for anything to be compressed: the first sink_size + 2 * lag_size = {least - 1} "
        f"tokens of a document stay as they are; give at least {least}{lag}, or {instead}.",
    )


def typed_config(composed: DictConfig, schema: type = TrainConfig) -> Any:
    """What Hydra composed, as an instance of the dataclass `schema`.

    Raises:
        LRSAError: an unknown key, a wrong type, a missing value or an impossible combination, in one sentence.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
        # Merged as plain values: a DictConfig would bring its own, laxer flags along, and drop unknown keys silently.
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(schema), values))
        try:
            return OmegaConf.to_object(merged)
        except LRSAError as error:
            raise all_of([str(error), *_all_mistakes(merged)]) from None
    except OmegaConfBaseException as error:
        raise LRSAError(config_sentence(error, schema)) from error


def _all_mistakes(merged: DictConfig) -> list[str]:
    """What every group, and then the whole, has to say against the values of a configuration."""
    with noting() as noted:
        for node in [*(value for value in merged.values() if isinstance(value, DictConfig)), merged]:
            try:
                OmegaConf.to_object(node)
            except LRSAError as error:
                noted.append(str(error))
            except Exception:  # a check that went on with the wrong value, which is noted
                pass
    return noted


def save_settings(settings: dict, path: Path) -> None:
    """Writes a resolved configuration as YAML, in the order of its keys."""
    OmegaConf.save(OmegaConf.create(settings), path)


def load_settings(path: Path) -> dict:
    """What `save_settings` wrote."""
    return cast(dict, OmegaConf.to_container(OmegaConf.load(path)))


def config_sentence(error: OmegaConfBaseException, schema: type = TrainConfig) -> str:
    """One sentence for what OmegaConf or Hydra found wrong with a key."""
    key = error.full_key or ""
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return unknown_key_sentence(key, schema)
    said = str(error.msg if key else error).splitlines()[0].rstrip(".")
    return f"{key}: {said}{_form_of(key, schema)}." if key else f"{said}."


def _form_of(key: str, schema: type) -> str:
    """How a dictionary or a list is written on the command line, for an error; empty for other fields."""
    node, path = schema, []
    for name in re.split(r"[.\[]", key):
        node = {f.name: f.type for f in fields(node)}.get(name) if is_dataclass(node) else None
        path.append(name)
        kinds = {get_origin(node), *map(get_origin, get_args(node))}
        form = "{key: value}" if dict in kinds else "[value,value]" if list in kinds else None
        if form is not None:
            return f"; write '{'.'.join(path)}={form}'"
    return ""


def unknown_key_sentence(key: str, schema: type = TrainConfig) -> str:
    """Says that `key` is unknown, what its group does know, and which of it looks most alike."""
    *groups, name = key.split(".")
    node = schema
    for group in groups:
        known = {f.name: f.type for f in fields(node)} if is_dataclass(node) else {}
        if not is_dataclass(known.get(group)):
            key = name = group
            break
        node = known[group]
    valid = [f.name for f in fields(node)]
    alike = difflib.get_close_matches(name, valid, n=1)
    hint = f" Did you mean {alike[0]}?" if alike else ""
    return f"{key} is not a key of the configuration; valid here: {', '.join(valid)}.{hint}"
