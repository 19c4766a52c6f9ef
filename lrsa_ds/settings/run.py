"""Settings of the groups that define how a run computes, and what it writes."""

from dataclasses import dataclass, field
from typing import Any

from lrsa_ds.errors import require, require_one_of, require_whole
from lrsa_ds.layer_ranges import mappings, read_layers
from lrsa_ds.lrsa_config import require_retention
from lrsa_ds.registry import EXCHANGES


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The loss; `weight`, `temperature` and `teacher` are settings of distillation.

    Args:
        kind: a name in the table of `lrsa_ds.objectives`.
        weight: share of the divergence from the teacher in the loss; the target loss has the rest.
        teacher: "self" (a dense pass of the present model) or "start" (of its start weights).
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
    """DeepSpeed ZeRO: what is sharded over the ranks, and what is offloaded to host memory."""

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


def shortened_warmup(num_steps: int) -> int:
    """Warm-up steps of a run with fewer steps than the warm-up in its settings."""
    return max(1, num_steps // 10)


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to `min_lr_ratio` of the peak.

    Args:
        shorten_warmup: whether a warm-up longer than the steps of `num_epochs` is shortened to a tenth of them.
    """

    lr: float = 1e-5
    num_steps: int = 1000
    num_epochs: float | None = None
    warmup_steps: int = 20
    shorten_warmup: bool = False
    grad_accum: int = 1
    micro_batch: int = 1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0
    on_nan: str = "stop"
    name: str = "adamw"

    def __post_init__(self):
        require_one_of("optim.name", self.name, ("adamw", "adamw_8bit"))
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
    """Evaluation under the caches of inference: before and after training, and every `every` steps (0: never).

    Args:
        layers: more caches, whose layers differ, as in `attention.layers`; None: those that steps use.
        telemetry: whether to measure, before and after training, what each layer loses under the smallest cache.
        telemetry_examples: number of examples for it.
        telemetry_greedy: number of layers to choose greedily to leave dense.
    """

    before: bool = True
    after: bool = True
    every: int = 0
    num_examples: int = 48
    allow_fewer: bool = False
    retentions: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25, 0.125])
    layers: Any = None
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
        require(self.retentions != [], "eval.retentions=[] is not valid: give numbers from 0 to 1.")
        for retention in self.retentions:
            require_retention("eval.retentions", retention)
        for layers in mappings("eval.layers", self.layers):
            read_layers(layers, "eval.layers")


@dataclass(kw_only=True)
class LogConfig:
    """Services that receive metrics besides `metrics.jsonl`.

    Args:
        peak_tflops: dense bf16 peak of the GPU, for `mfu`; None: from the table in `lrsa_ds.costs.gpus`.
    """

    wandb: str = "auto"
    tensorboard: bool = False
    mlflow: bool = False
    peak_tflops: float | None = None
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
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"log.peak_tflops={self.peak_tflops} is not valid: give the dense bf16 peak of the GPU in TFLOPS, above 0, "
            "or null.",
        )
        require_one_of("log.wandb", self.wandb, ("auto", "online", "offline", "disabled"))


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is written to disk during training (every `every` steps, 0: never) and at the end."""

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
