"""Which settings fit a machine, how long a sequence they reach, and which of them cost least."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from lrsa_ds.costs.gpus import GPU
from lrsa_ds.costs.job import Job, Levers
from lrsa_ds.costs.memory import GPUMemory, gpu_memory, host_memory
from lrsa_ds.costs.sizes import Sizes
from lrsa_ds.costs.time import StepTime, step_time

# Of a GPU's memory: what lies in pieces too small for the next tensor, with expandable segments; and what CUDA, its
# kernels and communicators take, in GB. On an H100 of 85.0 GB tensors of 78.0 GB were held, and of 83.7 not.
SHARE_IN_PIECES, CONTEXT_GB = 0.04, 1.0
MOST_TOKENS = 2**22  # longer sequences are not looked at
# From a GPU to one of another host: an adapter of 400 Gb/s for each.
NETWORK_GB_S = 50.0
# Settings that are slower by less than this are as good, if they are simpler: estimates are no better than that.
ALIKE = 0.05
# From the least to the most that is moved to the host. Tiles and saved attention are looked at with what they go with.
LEVERS = (
    Levers(),
    Levers(save_attention=True),
    Levers(tiled_mlp=True),
    Levers(save_attention=True, tiled_mlp=True),
    Levers(offload_checkpoints=True),
    Levers(save_attention=True, offload_checkpoints=True),
    Levers(offload_checkpoints=True, tiled_mlp=True),
    Levers(save_attention=True, offload_checkpoints=True, tiled_mlp=True),
    Levers(offload_optimizer=True),
    Levers(offload_optimizer=True, offload_checkpoints=True),
    Levers(offload_optimizer=True, offload_checkpoints=True, tiled_mlp=True),
    Levers(save_attention=True, offload_optimizer=True, offload_checkpoints=True, tiled_mlp=True),
    Levers(offload_optimizer=True, offload_checkpoints=True, tiled_mlp=True, offload_param=True),
)


@dataclass(frozen=True)
class Machine:
    """The GPUs and hosts of a plan; `host_memory_gb` of each host, None for no limit."""

    name: str
    gpu: GPU
    num_gpus: int
    gpus_per_node: int
    network_gb_s: float
    host_memory_gb: float | None

    @property
    def usable_gb(self) -> float:
        """What the tensors of a rank may take."""
        return self.gpu.memory_gb * (1 - SHARE_IN_PIECES) - CONTEXT_GB

    def __str__(self) -> str:
        return f"{self.num_gpus} × {self.name}"


@dataclass(frozen=True)
class Estimate:
    """What a job takes on a machine."""

    sizes: Sizes
    job: Job
    machine: Machine

    @cached_property
    def memory(self) -> GPUMemory:
        return gpu_memory(self.sizes, self.job)

    @cached_property
    def host(self) -> dict[str, int]:
        return host_memory(self.sizes, self.job)

    @cached_property
    def time(self) -> StepTime | None:
        return step_time(self.sizes, self.job, self.machine.gpu, self.machine.network_gb_s)

    @cached_property
    def longest(self) -> int:
        """The longest sequence that fits with these settings, 0 for none."""
        return longest(self.sizes, self.job, self.machine)

    @property
    def fits(self) -> bool:
        most = self.machine.host_memory_gb
        return self.gpu_gb <= self.machine.usable_gb and (most is None or self.host_gb < most)

    @property
    def gpu_gb(self) -> float:
        return self.memory.peak / 1e9

    @property
    def host_gb(self) -> float:
        return sum(self.host.values()) / 1e9

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU; 0 if the time is not known."""
        return self.job.tokens_a_step / self.job.num_gpus / self.time.seconds if self.time else 0.0


def longest(sizes: Sizes, job: Job, machine: Machine) -> int:
    """The longest sequence that fits, in whole steps of 1,024 tokens or more; at most `MOST_TOKENS`."""
    step = max(1024, 256 * job.sp_size)  # ranks share a row in whole blocks of two stretches

    def fits(count: int) -> bool:
        return Estimate(sizes, job.with_length(count * step), machine).fits

    low, high, most = 0, 1, MOST_TOKENS // step
    while fits(high):  # the same lengths for all levers: what depends on the length alone is counted once
        if high == most:
            return most * step
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def alternatives(job: Job, sp_sizes: Iterable[int], can_tile: bool, can_offload: bool) -> list[Job]:
    """The job with every SP size and set of levers that go with it.

    Args:
        can_tile: whether the MLPs of the model can be tiled.
        can_offload: whether the optimizer can compute on the host.
    """

    def possible(levers: Levers) -> bool:
        return (
            (can_tile or not levers.tiled_mlp)
            and (job.checkpointing or not (levers.offload_checkpoints or levers.save_attention))
            and (can_offload or not levers.offload_optimizer)
            and (job.stage == 3 or not levers.offload_param)
        )

    return [replace(job, sp_size=size, levers=levers) for size in sp_sizes for levers in LEVERS if possible(levers)]


def cheapest(estimates: Iterable[Estimate], chosen: Estimate) -> Estimate | None:
    """The fastest that fits. Of those that are about as fast it is `chosen`, or else one with the fewest levers."""
    fitting = [found for found in [chosen, *estimates] if found.fits]
    most = max((found.tokens_per_second for found in fitting), default=0.0)
    alike = [found for found in fitting if found.tokens_per_second >= most * (1 - ALIKE)]
    if chosen in alike:
        return chosen
    return min(alike, key=lambda found: sum(vars(found.job.levers).values()), default=None)
