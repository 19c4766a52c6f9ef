"""A plan in lines of text."""

from collections.abc import Iterable, Mapping

from lrsa_ds.costs.flops import step_flops
from lrsa_ds.costs.job import Job
from lrsa_ds.costs.plan import MOST_TOKENS, Estimate, Machine
from lrsa_ds.costs.sizes import Sizes
from lrsa_ds.costs.traffic import traffic_of

WIDTH = 46


def describe(sizes: Sizes, found: Estimate, machine: Machine) -> list[str]:
    """Everything about one estimate."""
    job = found.job
    return [
        f"{sizes.num_parameters / 1e6:,.1f}M parameters, {sizes.num_trained / 1e6:,.1f}M of them trained; on {machine}",
        f"{job.seq_len:,} tokens a sequence, {job.micro_batch} × {job.num_gpus // job.sp_size} at once, sp_size "
        f"{job.sp_size}; levers: {job.levers}",
        "",
        *_memory(found, machine),
        f"longest sequence with these settings: {_length(found.longest)}",
        "",
        "host memory of a node, GB (beside a few GB of each process)",
        *_lines(_in_gb(found.host) | {"sum": found.host_gb}, ".1f"),
        *_sent(sizes, job),
        *_flops(sizes, job),
        *_time(found),
        *_not_counted(sizes),
    ]


def _not_counted(sizes: Sizes) -> list[str]:
    """What an estimate leaves out, in a sentence."""
    if not sizes.shape.recurrences:
        return []
    return [
        "",
        "recurrent layers: the operations of transformers' PyTorch code and what it saves are counted; the gradients "
        "inside a recurrence and the time of its small kernels are not.",
    ]


def _memory(found: Estimate, machine: Machine) -> list[str]:
    memory = found.memory
    lines = ["GPU memory of a rank, GB", *_lines(_in_gb(memory.static), ".2f")]
    for name, parts in memory.moments.items():
        lines += [f"  and in the {name}", *(f"  {line}" for line in _lines(_in_gb(parts), ".2f", WIDTH - 2))]
    room = "fits" if found.fits else "does not fit"
    return [
        *lines,
        *_lines({f"peak, in the {memory.peak_moment}": found.gpu_gb}, ".2f"),
        f"  {room}: {machine.usable_gb:.1f} of {machine.gpu.memory_gb:g} GB can be used",
    ]


def _in_gb(sizes: Mapping[str, int]) -> dict[str, float]:
    return {name: size / 1e9 for name, size in sizes.items()}


def _lines(parts: Mapping[str, float], form: str, width: int = WIDTH) -> list[str]:
    """A line a part; parts of nothing are left out."""
    return [f"  {name:<{width}}{value:>10{form}}" for name, value in parts.items() if value or name == "sum"]


def _length(longest: int) -> str:
    most = "at least " if longest > MOST_TOKENS - 2**16 else ""  # it counts in steps
    return f"{most}{longest:,} tokens" if longest else "none: weights, gradients and optimizer states are too large"


def _sent(sizes: Sizes, job: Job) -> list[str]:
    sent = traffic_of(sizes, job, job.turns[0])
    of_sequence = {f"sequence parallelism: {name}": count / 1e9 for name, count in sent.sequence.items()}
    of_zero = {f"ZeRO: {name}": count / 1e9 for name, count in sent.zero.items()}
    lines = _lines(of_sequence | of_zero, ".3f")
    return ["", "sent by a rank in a step, GB", *lines] if lines else []


def _flops(sizes: Sizes, job: Job) -> list[str]:
    flops = step_flops(sizes.shape, job.passes, job.document_lengths, job.num_targets * job.micro_batch, job.turns[0])
    each = job.grad_accum / job.sp_size / 1e12
    return [
        "",
        "operations of a GPU in a step, TFLOP",
        *_lines(
            {
                "executed: matrices": flops.executed.matrices * each,
                "executed: attention": flops.executed.attention * each,
                "if attention were dense, in all": flops.dense.total * each,
            },
            ",.0f",
        ),
    ]


def _time(found: Estimate) -> list[str]:
    if found.time is None:
        return ["", "no step time is estimated: peak_tflops and memory_gb_s of the GPU are not known"]
    return [
        "",
        "time of a step, s",
        *_lines(found.time.parts, ".2f"),
        *_lines({"sum": found.time.seconds}, ".2f"),
        f"  {found.tokens_per_second:,.0f} tokens/s a GPU",
    ]


def table(estimates: Iterable[Estimate]) -> list[str]:
    """One line an SP size and set of levers."""
    head = (
        f"{'sp_size':>7}  {'levers':<70}{'GPU GB':>8}{'host GB':>9}{'s a step':>10}{'tokens/s/GPU':>14}{'longest':>12}"
    )
    return [head, *map(_row, estimates)]


def _row(found: Estimate) -> str:
    seconds = f"{found.time.seconds:.2f}" if found.time else "?"
    rate = f"{found.tokens_per_second:,.0f}" if found.time else "?"
    return (
        f"{found.job.sp_size:>7}  {found.job.levers!s:<70}{found.gpu_gb:>8.1f}{found.host_gb:>9.1f}{seconds:>10}"
        f"{rate:>14}{found.longest:>12,}{'' if found.fits else '  does not fit'}"
    )


def recommendation(best: Estimate | None, chosen: Estimate) -> str:
    """The cheapest settings that fit, as what to type."""
    if best is None:
        return ""
    if best.job == chosen.job:
        return "recommended: the settings as they are, the cheapest of these that fit"
    typed = " ".join([f"parallel.sp_size={best.job.sp_size}", *best.job.levers.overrides()])
    return f"recommended, the cheapest of these that fit: {typed}"


def no_fit_sentence(estimates: Iterable[Estimate], job: Job, machine: Machine) -> str:
    """Why no settings fit, and what would."""
    reach = max(estimates, key=lambda found: found.longest)
    what = f"seq_len={job.seq_len} does not fit on {machine} by any of the settings of memory, zero.offload_* and "
    if not reach.longest:
        held = sum(reach.memory.static.values()) / 1e9
        return (
            f"{what}parallel.sp_size: weights, gradients and optimizer states alone take {held:.0f} GB of a GPU; give "
            "more GPUs, or train adapters (model.lora.rank), on a base in 4 bits (model.quantize)."
        )
    typed = " ".join([f"parallel.sp_size={reach.job.sp_size}", *reach.job.levers.overrides()])
    limit = ", within host_memory_gb" if machine.host_memory_gb else ""
    return f"{what}parallel.sp_size{limit}: give at most {reach.longest:,} tokens, with {typed}, or more GPUs."
