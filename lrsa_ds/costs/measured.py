"""Estimates beside what launch/benchmark_steps.py has measured."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.gpus import SHARE_OF_KERNEL, gpu_of_device
from lrsa_ds.costs.job import Job, Levers
from lrsa_ds.costs.memory import gpu_memory
from lrsa_ds.costs.plan import Machine
from lrsa_ds.costs.sizes import Sizes
from lrsa_ds.costs.time import step_time
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.layers import each_in_model
from lrsa_ds.registry import EXCHANGES


@dataclass(frozen=True)
class Comparison:
    """A row that was measured, and the estimates for it; times in seconds, memory in GB."""

    job: Job
    device: str
    peak: float
    estimated_peak: float
    seconds: float
    estimated_seconds: float | None

    def line(self) -> str:
        """A row of a Markdown table."""
        job = self.job
        kind = "dense" if job.turns[0].is_dense else f"LRSA {job.turns[0].retention:g}"
        fused = " (Liger)" if job.fused else ""
        seconds = (
            _beside(self.estimated_seconds, self.seconds) if self.estimated_seconds else f"? | {self.seconds:.2f} | "
        )
        return (
            f"| {job.seq_len:,} | {kind}{fused} | {job.num_gpus} × {self.device} | {job.sp_size} | {job.levers} | "
            f"{_beside(self.estimated_peak, self.peak)} | {seconds} |"
        )


def _beside(estimated: float, measured: float) -> str:
    return f"{estimated:.2f} | {measured:.2f} | {estimated / measured - 1:+.1%}"


def compared(path: Path, config: TrainConfig, job: Job, sizes: Sizes, machine: Machine) -> list[str]:
    """A Markdown table of the rows of a CSV file that are of this model.

    Raises:
        LRSAError: the file cannot be read, or has no such row.
    """
    rows = comparisons(path, config, job, sizes, machine)
    run = _family(config.run_name)
    require(bool(rows), f"compare={path} has no row of a step of {run} with model.lora.rank={config.model.lora.rank}.")
    head = ["tokens", "attention", "GPUs", "SP", "levers"]
    head += ["GPU GB, estimated", "measured", "off by", "s a step, estimated", "measured", "off by"]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(row.line() for row in rows)]


def comparisons(path: Path, config: TrainConfig, job: Job, sizes: Sizes, machine: Machine) -> list[Comparison]:
    try:
        with path.expanduser().open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise LRSAError(f"compare={path} cannot be read ({error}): give a CSV file of benchmark_steps.py.") from error
    ours = [row for row in rows if _family(row.get("run") or "") == _family(config.run_name) and row.get("peak_gb")]
    ours = [row for row in ours if int(row.get("lora_rank") or 0) == config.model.lora.rank]
    ours = [row for row in ours if (row.get("quantize") or None) == config.model.quantize]
    return [_comparison(row, config, job, sizes, machine) for row in ours]


def _family(run_name: str) -> str:
    """The part of a run's name before attention and length."""
    return run_name.partition("-")[0]


def _comparison(row: dict[str, str], config: TrainConfig, job: Job, sizes: Sizes, machine: Machine) -> Comparison:
    retention = float(row["retention"])
    attention = replace(
        config.attention, kind="dense" if retention == 1 else "lrsa", retention=retention, lag_size=int(row["lag_size"])
    )
    measured = replace(
        job,
        num_gpus=int(row["gpus"]),
        sp_size=int(row["sp_size"]),
        exchange=EXCHANGES.name_of(row.get("exchange") or job.exchange),
        seq_len=int(row["num_tokens"]),
        stage=int(row["zero"]),
        fused=row.get("liger_kernel") == "True",
        levers=Levers.by_devices(
            row.get("offload_optimizer"),
            row.get("offload_param"),
            save_attention=row.get("save_attention") == "True",
            offload_checkpoints=row.get("offload_checkpoints") == "True",
            tiled_mlp=row.get("tiled_mlp") == "True",
        ),
        turns=each_in_model(attention.turns, job.layers),
    )
    gpu = gpu_of_device(row["device"]) or machine.gpu
    gpu = replace(gpu, attention_share=SHARE_OF_KERNEL.get(row.get("backend", ""), gpu.attention_share))
    time = step_time(sizes, measured, gpu, machine.network_gb_s)
    return Comparison(
        measured,
        row["device"],
        float(row["peak_gb"]),
        gpu_memory(sizes, measured).peak / 1e9,
        float(row["ms_p50"]) / 1e3,
        time.seconds if time else None,
    )
