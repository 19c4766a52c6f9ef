"""How much of the GPU a step uses: operations a second, their share of the peak, time by phase, and host memory."""

import time
from collections.abc import Sequence

import psutil
import torch

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.flops import Passes, step_flops
from lrsa_ds.costs.gpus import gpu_of_device
from lrsa_ds.costs.shape import model_shape
from lrsa_ds.layers import AnyConfig
from lrsa_ds.models.tiling import num_tiles
from lrsa_ds.objectives.objective import Objective
from lrsa_ds.process.launcher import ranks_of_host


def passes_of(config: TrainConfig, retentions: Sequence[float]) -> Passes:
    """How a step goes through the model; `retentions` are those of the objective's passes without gradients."""
    return Passes(
        checkpointing=config.activation_checkpointing,
        tiled_mlp=num_tiles(config) > 1,
        without_gradient=tuple(config.attention.with_retention(r) for r in retentions),
    )


def peak_of(config: TrainConfig, device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in TFLOPS: `log.peak_tflops`, or that of a known GPU; None if neither is there."""
    known = gpu_of_device(device_name)
    return config.log.peak_tflops or (known.peak_tflops if known else None)


def describe_peak(config: TrainConfig, device_name: str) -> str:
    """What a run says where `mfu` is left out; else empty."""
    if peak_of(config, device_name) is not None:
        return ""
    return f"mfu is left out: the peak of {device_name} is not known; give it in TFLOPS as log.peak_tflops"


class Throughput:
    """Counts the operations of steps, and what they are a second on each GPU.

    Args:
        config: with the settings of every layer.
    """

    def __init__(self, config: TrainConfig, objective: Objective, device_name: str, world_size: int):
        self._shape = model_shape(objective.lm)  # None: no operations are counted, and no figure of them is given
        self._passes = passes_of(config, objective.retentions)
        self._peak = peak_of(config, device_name)
        self._world_size = world_size
        self._executed = self._dense = 0.0

    def count(self, document_lengths: Sequence[int], num_slots: int, attention: AnyConfig) -> tuple[float, float]:
        """Operations over a packed row: executed, and if the attention were dense."""
        if self._shape is None:
            return 0.0, 0.0
        flops = step_flops(self._shape, self._passes, document_lengths, num_slots, attention)
        return flops.executed.total, flops.dense.total

    def begin(self, executed: float, dense: float) -> None:
        """Takes the operations of a step, over all ranks."""
        self._executed, self._dense = executed, dense

    def rates(self, seconds: float) -> dict[str, float]:
        """`tflops_executed`, `tflops_dense` and `mfu` of a GPU in the step, which took so many seconds.

        Nothing for a model whose operations cannot be counted.
        """
        if self._shape is None:
            return {}
        executed, dense = (flops / seconds / self._world_size / 1e12 for flops in (self._executed, self._dense))
        share = {} if self._peak is None else {"mfu": executed / self._peak}
        return {"tflops_executed": executed, "tflops_dense": dense, **share}


class PhaseClock:
    """Times the phases of a step in the order of the work: on a GPU by events, so that nothing waits for them."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self._laps = [("", self._now())]

    def lap(self, phase: str) -> None:
        """The work since the last call was that of `phase`."""
        self._laps.append((phase, self._now()))

    def seconds(self, phases: Sequence[str]) -> list[float]:
        """Of each phase, summed over the step so far."""
        totals = dict.fromkeys(phases, 0.0)
        for (_, before), (phase, after) in zip(self._laps, self._laps[1:], strict=False):
            totals[phase] += _between(before, after)
        return list(totals.values())

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        after.synchronize()
        return before.elapsed_time(after) / 1e3
    assert isinstance(before, float) and isinstance(after, float)
    return after - before


def host_memory_gb() -> float:
    """Resident memory of this process, in 1e9 bytes."""
    return psutil.Process().memory_info().rss / 1e9


def num_hosts(world_size: int) -> int:
    """Hosts of the run, as the launcher says it."""
    return max(1, world_size // ranks_of_host(otherwise=world_size))
