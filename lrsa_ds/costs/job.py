"""What of a run's settings decides its costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.flops import Passes
from lrsa_ds.layer_settings import ModelLayers
from lrsa_ds.layers import AnyConfig, each_in_model


@dataclass(frozen=True, kw_only=True)
class Levers:
    """What is given in time for memory, and `save_attention`, which is given in memory for time."""

    save_attention: bool = False
    offload_checkpoints: bool = False
    tiled_mlp: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False

    @classmethod
    def by_devices(cls, optimizer: str | None, param: str | None, **others: bool) -> "Levers":
        """With the optimizer's states and the parameters on these devices; parameters on the host bring those along."""
        return cls(offload_optimizer="cpu" in (optimizer, param), offload_param=param == "cpu", **others)

    def overrides(self) -> list[str]:
        """The same on the command line, those that are off too."""
        flags = {True: "true", False: "false"}, {True: "cpu", False: "none"}
        return [
            f"memory.save_attention={flags[0][self.save_attention]}",
            f"memory.offload_checkpoints={flags[0][self.offload_checkpoints]}",
            f"memory.tiled_mlp={flags[0][self.tiled_mlp]}",
            f"zero.offload_optimizer={flags[1][self.offload_optimizer]}",
            f"zero.offload_param={flags[1][self.offload_param]}",
        ]

    def include(self, other: "Levers") -> bool:
        """Whether all levers that are on in `other` are on."""
        return all(getattr(self, name) for name, value in vars(other).items() if value)

    def __str__(self) -> str:
        names = [name for name, value in vars(self).items() if value]
        return " + ".join(names) or "none"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run in integers. Every sequence is taken to be one document, the most that attention can cost.

    Args:
        num_gpus: of all hosts, each with `gpus_per_node`.
        seq_len: tokens of a sequence; each of `num_gpus / sp_size` replicas takes `micro_batch` at once.
        num_targets: target tokens of a sequence, of which `chunk_size` have their logits in memory.
        itemsize: bytes of a weight.
        state_bytes: of the two moments of a parameter.
        bucket: parameters whose gradients are reduced at once.
        tile_size: tokens of a tile of the MLPs, where they are tiled.
        fused: whether norms, rotary embedding and MLP are Liger's kernels.
        turns: the attention that steps take in turn; `taught` that of passes without gradients.
        num_frozen: parameters of copies that are not trained.
        layers: of the model; None where LRSA takes all of them.
        quantized: whether the matrices of the layers are in 4 bits, but for adapters.
        double_quant: whether their scales are in 8 bits.
    """

    num_gpus: int
    gpus_per_node: int = 8
    sp_size: int
    exchange: str
    seq_len: int
    micro_batch: int
    grad_accum: int
    num_targets: int
    chunk_size: int
    itemsize: int
    stage: int
    state_bytes: int
    bucket: int
    tile_size: int
    fused: bool
    checkpointing: bool
    levers: Levers
    turns: tuple[AnyConfig, ...]
    taught: tuple[AnyConfig, ...] = ()
    num_frozen: int = 0
    layers: ModelLayers | None = None
    quantized: bool = False
    double_quant: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that a rank holds at once."""
        return self.seq_len * self.micro_batch // self.sp_size

    @property
    def document_lengths(self) -> tuple[int, ...]:
        return (self.seq_len,) * self.micro_batch

    @property
    def passes(self) -> Passes:
        return Passes(
            checkpointing=self.checkpointing,
            tiled_mlp=self.levers.tiled_mlp and self.num_tokens > self.tile_size,
            save_attention=self.levers.save_attention,
            without_gradient=self.taught,
        )

    @property
    def tokens_a_step(self) -> int:
        """Of all replicas."""
        return self.seq_len * self.micro_batch * self.grad_accum * self.num_gpus // self.sp_size

    def with_length(self, seq_len: int) -> "Job":
        return replace(self, seq_len=seq_len)


def job_of(
    config: TrainConfig,
    num_gpus: int,
    itemsize: int,
    num_frozen: int = 0,
    retentions: Sequence[float] = (),
    num_targets: int | None = None,
    gpus_per_node: int = 8,
    model: ModelLayers | None = None,
) -> Job:
    """The job of a configuration with the settings of every layer.

    Args:
        model: its layers; None where LRSA takes all of them.
        itemsize: bytes of a weight.
        num_frozen: parameters of copies that are not trained.
        retentions: of the objective's passes without gradients.
        num_targets: of a sequence; None for as many as have their logits in memory at once.
    """
    zero, memory, optim = config.zero, config.memory, config.optim

    return Job(
        num_gpus=num_gpus,
        gpus_per_node=gpus_per_node,
        sp_size=config.parallel.sp_size,
        exchange=config.parallel.exchange,
        seq_len=config.seq_len,
        micro_batch=optim.micro_batch,
        grad_accum=optim.grad_accum,
        num_targets=min(config.seq_len, num_targets or config.loss_chunk_size),
        chunk_size=config.loss_chunk_size,
        itemsize=itemsize,
        stage=zero.stage,
        state_bytes=2 if optim.name == "adamw_8bit" else 8,
        bucket=zero.reduce_bucket_size,
        tile_size=memory.tile_size,
        fused=config.model.liger_kernel,
        checkpointing=config.activation_checkpointing,
        levers=levers_of(config),
        turns=each_in_model(config.attention.turns, model),
        taught=each_in_model(map(config.attention.with_retention, retentions), model),
        num_frozen=num_frozen,
        layers=model,
        quantized=config.model.quantize is not None,
        double_quant=config.model.double_quant,
    )


def with_levers(config: TrainConfig, levers: Levers) -> TrainConfig:
    """The configuration with these levers on, and the others off."""
    devices = {False: "none", True: "cpu"}
    memory = replace(
        config.memory,
        save_attention=levers.save_attention,
        offload_checkpoints=levers.offload_checkpoints,
        tiled_mlp=levers.tiled_mlp,
    )
    zero = replace(
        config.zero,
        offload_optimizer=devices[levers.offload_optimizer],
        offload_param=devices[levers.offload_param],
    )
    return replace(config, memory=memory, zero=zero)


def levers_of(config: TrainConfig) -> Levers:
    """The levers that a configuration has on."""
    return Levers.by_devices(
        config.zero.offload_optimizer,
        config.zero.offload_param,
        save_attention=config.memory.save_attention,
        offload_checkpoints=config.memory.offload_checkpoints,
        tiled_mlp=config.memory.tiled_mlp,
    )
