"""How well a step uses the GPU: operations per second, their share of the peak, time by phase, and host memory."""

import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.functional import silu

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.flops import Passes, step_flops
from lrsa_ds.costs.gpus import gpu_of_device
from lrsa_ds.costs.shape import model_shape
from lrsa_ds.layer_settings import Layers
from lrsa_ds.layers import AnyConfig, in_model
from lrsa_ds.models.structure import layers_of
from lrsa_ds.models.tiling import num_tiles
from lrsa_ds.objectives.objective import Objective
from lrsa_ds.process.launcher import ranks_of_host

# Tokens and largest width of the layer that is timed for a guess before the first step. On a GPU it is larger, so that
# its kernels take longer than their launches; on two CPU cores it takes 60 ms for a width of 576.
LAYER_TOKENS, WIDEST = {"cuda": 8192, "cpu": 1024}, {"cuda": 2048, "cpu": 1024}
HEAD_CHANNELS = 64
MOST_PASSES, LONGEST = 8, 0.5  # through it, and seconds after which no other one begins
# Time of an operation of a model over that of the layer: rotary embedding, selection, the loss. Measured for SmolLM2 on
# two idle CPU cores: 1.1 to 1.2.
MODEL_OVER_LAYER = 1.2


def passes_of(config: TrainConfig, retentions: Sequence[float], model: Layers) -> Passes:
    """The passes of a step through the model; `retentions` are those of the objective's passes without gradients."""
    return Passes(
        checkpointing=config.activation_checkpointing,
        tiled_mlp=num_tiles(config) > 1,
        save_attention=config.memory.save_attention,
        without_gradient=tuple(in_model(config.attention.with_retention(r), model) for r in retentions),
    )


def peak_of(config: TrainConfig, device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in TFLOPS: `log.peak_tflops`, or that of a known GPU; None if neither is known."""
    known = gpu_of_device(device_name)
    return config.log.peak_tflops or (known.peak_tflops if known else None)


def describe_peak(config: TrainConfig, device_name: str) -> str:
    """A sentence for a run without `mfu`; else empty."""
    if peak_of(config, device_name) is not None:
        return ""
    return f"mfu is left out: the peak of {device_name} is not known; give it in TFLOPS as log.peak_tflops"


class Throughput:
    """Counts the operations of steps, and converts them to rates per GPU.

    Args:
        config: with the settings of each layer.
    """

    def __init__(self, config: TrainConfig, objective: Objective, device_name: str, world_size: int):
        self._layers = layers_of(objective.lm.config)
        self._shape = model_shape(objective.lm)  # None: operations are not counted, and no rates are logged
        self._passes = passes_of(config, objective.retentions, self._layers)
        self._peak = peak_of(config, device_name)
        self._world_size = world_size
        self._executed = self._dense = 0.0

    def count(self, document_lengths: Sequence[int], num_slots: int, attention: AnyConfig) -> tuple[float, float]:
        """Operations for a packed row: executed, and with dense attention."""
        if self._shape is None:
            return 0.0, 0.0
        flops = step_flops(self._shape, self._passes, document_lengths, num_slots, in_model(attention, self._layers))
        return flops.executed.total, flops.dense.total

    def begin(self, executed: float, dense: float) -> None:
        """Sets the operations of a step, over all ranks."""
        self._executed, self._dense = executed, dense

    def rates(self, seconds: float) -> dict[str, float]:
        """`tflops_executed`, `tflops_dense` and `mfu` per GPU, for the step that took `seconds`.

        Empty for a model whose operations cannot be counted.
        """
        if self._shape is None:
            return {}
        executed, dense = (flops / seconds / self._world_size / 1e12 for flops in (self._executed, self._dense))
        share = {} if self._peak is None else {"mfu": executed / self._peak}
        return {"tflops_executed": executed, "tflops_dense": dense, **share}


@torch.no_grad()
def seconds_of_flop(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The time of an operation of a model of this width, here and now: that of torch's own decoder layer.

    A product of matrices alone is not enough: on cores that other processes use, the many short operations between the
    products lose more time than the products.
    """
    num_tokens = LAYER_TOKENS[device.type]
    heads = max(1, min(width, WIDEST[device.type]) // HEAD_CHANNELS)
    width = heads * HEAD_CHANNELS
    # The activation is a function, so that torch does not take its fused layer.
    options: dict[str, Any] = dict(dropout=0.0, activation=silu, norm_first=True, batch_first=True, bias=False)
    layer = nn.TransformerEncoderLayer(width, heads, 3 * width, **options, dtype=dtype, device=device)
    tokens = torch.ones(1, num_tokens, width, dtype=dtype, device=device)
    layer(tokens)  # the first pass is slower
    clock, times = PhaseClock(device), []
    begun = time.monotonic()
    while len(times) < MOST_PASSES and time.monotonic() - begun < LONGEST:
        clock.start()
        layer(tokens)
        clock.lap("layer")
        times += clock.seconds(["layer"])
    # 4 squares of the width in its attention and 6 in its MLP, and the scores of all pairs with their sums of values.
    flops = 2 * num_tokens * 10 * width**2 + 4 * num_tokens**2 * width
    # The fastest pass: processes that start with the run, such as those that read data, slow down the others.
    return MODEL_OVER_LAYER * min(times) / flops


class PhaseClock:
    """Times the phases of a step; on a GPU with events, so that the host does not wait."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self._laps = [("", self._now())]

    def lap(self, phase: str) -> None:
        """Attributes the work since the last call to `phase`."""
        self._laps.append((phase, self._now()))

    def seconds(self, phases: Sequence[str]) -> list[float]:
        """Seconds of each phase, summed over the step so far."""
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
    """Number of hosts of the run, from the launcher's variables."""
    return max(1, world_size // ranks_of_host(otherwise=world_size))
