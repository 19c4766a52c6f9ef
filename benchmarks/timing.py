"""Times and memory of calls, on a GPU to the end of the work that they start."""

import time
from collections.abc import Callable

import torch


def percentiles(times: list[float]) -> dict[str, float]:
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80}


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, to the end of the work that it started."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def peak_gb(function: Callable[[], object], device: torch.device) -> float | str:
    """Memory that a call takes beyond what is there before, in 1e9 bytes; not known on the CPU."""
    if device.type != "cuda":
        function()
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def measure(function: Callable[[], object], repetitions: int, device: torch.device) -> dict[str, float | str]:
    """Times of a call after one that may compile, and its memory."""
    first = timed(function, device)
    peak = peak_gb(function, device)
    times = [timed(function, device) for _ in range(repetitions)]
    return percentiles(times) | {"peak_gb": peak, "first_call_s": first / 1e3}


def gpu_ms(function: Callable[[], object], device: torch.device) -> float | str:
    """Time that the GPU works in a call; not known on the CPU."""
    if device.type != "cuda":
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e3
