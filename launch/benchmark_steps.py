"""Times complete optimizer steps with LRSA and dense attention, one document per sequence; rows go to a CSV file.

    python launch/benchmark_steps.py --num-tokens 131072 --retention 1 0.25 0.125 -- +recipe=step_1b5
    deepspeed --num_gpus 2 launch/benchmark_steps.py --num-tokens 262144 -- +recipe=step_1b5 parallel.sp_size=2

The arguments after `--` are a configuration of launch/train.py, whose model, parallelism and optimizer are timed on
random tokens. Retention 1 is dense attention: torch's cuDNN kernel on one rank per sequence, DeepSpeed's Ulysses on
several. The program ends at the first length for which memory runs out, with a row about it: give ascending lengths.
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import recipes  # noqa: E402
from benchmarks.timing import percentiles  # noqa: E402
from launch.benchmark import append, setting  # noqa: E402
from launch.cli.command import leave, run_command  # noqa: E402
from lrsa_ds.config import TrainConfig  # noqa: E402
from lrsa_ds.data.packing import IGNORE, PackedSequence  # noqa: E402
from lrsa_ds.errors import require  # noqa: E402
from lrsa_ds.parallel.mesh import Mesh, start_mesh, stop_mesh  # noqa: E402
from lrsa_ds.settings.attention import AttentionConfig  # noqa: E402
from lrsa_ds.train.plan import Plan, prepare  # noqa: E402
from lrsa_ds.train.run import build_engine  # noqa: E402
from lrsa_ds.train.throughput import host_memory_gb  # noqa: E402
from lrsa_ds.train.trainer import Engine, Trainer, peak_memory_gb, reset_peak_memory  # noqa: E402

NUM_TARGETS = 1024
FASTEST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def arguments() -> argparse.Namespace:
    """The options of this program; `overrides` are those of the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--retention", type=float, nargs="+", default=[0.125])
    parser.add_argument("--steps", type=int, default=5, help="after one that may compile")
    parser.add_argument(
        "--dense-warm-up-tokens", type=int, metavar="N", help="the first step of retention 1 takes N tokens"
    )
    parser.add_argument("--csv", type=Path, default=Path("outputs/steps.csv"))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def random_sequence(num_tokens: int, vocabulary: int) -> PackedSequence:
    """One document, the same on every rank; its last tokens are the targets."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    labels[-NUM_TARGETS - 1 : -1] = ids[-NUM_TARGETS:]
    return PackedSequence(
        ids, labels, torch.arange(num_tokens), (num_tokens,), ("random",), (0,), num_tokens, NUM_TARGETS
    )


def timed_step(
    trainer: Trainer, step: int, sequences: list[PackedSequence], device: torch.device
) -> tuple[float, dict]:
    """Seconds of an optimizer step, and its metrics."""
    started = time.perf_counter()
    metrics = trainer.train_step(step, sequences)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, metrics


def measure(
    trainer: Trainer,
    sequences: list[PackedSequence],
    first: list[PackedSequence],
    num_steps: int,
    device: torch.device,
) -> dict:
    """Times of `num_steps` steps on `sequences`; time of the step on `first` before them; peak memory, bytes sent."""
    reset_peak_memory(device)
    first_time, _ = timed_step(trainer, 0, first, device)
    times = []
    for step in range(1, num_steps + 1):
        elapsed, metrics = timed_step(trainer, step, sequences, device)
        times.append(elapsed)
    values = percentiles([1e3 * t for t in times]) | {"first_step_s": first_time, "peak_gb": peak_memory_gb(device)}
    values["host_gb"] = host_memory_gb()
    values["tokens_per_second"] = metrics["num_tokens"] / (values["ms_p50"] / 1e3)
    values |= trainer.throughput.rates(values["ms_p50"] / 1e3)
    for name in ("sent_bytes", "ulysses_bytes"):
        directions = [metrics.get(f"{name}_{direction}", 0) for direction in ("forward", "backward")]
        values[f"{name}_per_layer"] = sum(directions)
    return values


def rows(config: TrainConfig, options: argparse.Namespace, engine: Engine, plan: Plan, mesh: Mesh):
    """Yields a row for each retention and length; the last one may report that memory has run out."""
    per_step = config.optim.micro_batch * config.optim.grad_accum
    vocabulary = len(plan.tokenizer)
    for retention in options.retention:
        kind = "dense" if retention == 1 else "lrsa"
        attention: AttentionConfig = replace(config.attention, kind=kind, retention=retention)
        for num_tokens in options.num_tokens:
            chosen = replace(config, attention=attention, seq_len=num_tokens)
            trainer = Trainer(chosen, mesh, engine, iter(()))
            row = {"num_tokens": num_tokens, "attention": kind, "retention": retention}
            sequences = [random_sequence(num_tokens, vocabulary)] * per_step
            first = sequences
            # cuDNN compiles little, and long dense steps take long.
            if kind == "dense" and options.dense_warm_up_tokens:
                first = [random_sequence(options.dense_warm_up_tokens, vocabulary)] * per_step
            try:
                with sdpa_kernel(FASTEST_FIRST, set_priority=True) if kind == "dense" else nullcontext():
                    values = measure(trainer, sequences, first, options.steps, mesh.device)
            except torch.OutOfMemoryError:
                yield row | {"ms_p50": "out of memory"}
                return
            yield row | values


def benchmark(config: TrainConfig, options: argparse.Namespace) -> bool:
    longest = max(options.num_tokens)
    require(min(options.num_tokens) > NUM_TARGETS, f"--num-tokens has to be above {NUM_TARGETS}.")
    require(options.steps >= 1, "--steps has to be 1 or more.")
    warm_up = options.dense_warm_up_tokens
    require(
        warm_up is None or NUM_TARGETS < warm_up <= min(options.num_tokens),
        f"--dense-warm-up-tokens={warm_up} has to be above {NUM_TARGETS} and at most the smallest of --num-tokens.",
    )
    config = replace(config, output_dir=None, seq_len=longest)
    plan = prepare(config, recipes.load_procedure(config.procedure))
    config = replace(config, memory=plan.config.memory, zero=plan.config.zero)  # as memory=auto has chosen
    mesh = start_mesh(config.parallel.sp_size, exchange=config.parallel.exchange)
    engine = build_engine(config, plan, mesh)
    engine.train()
    where = setting(mesh.device) | {"gpus": mesh.world_size, "sp_size": mesh.sp_size, "run": config.run_name}
    where |= {"exchange": config.parallel.exchange if mesh.sp_size > 1 else "", "backend": config.attention.backend}
    where |= {"zero": config.zero.stage, "liger_kernel": config.model.liger_kernel}
    where |= {"lag_size": config.attention.lag_size, "lora_rank": config.model.lora.rank}
    where |= {"quantize": config.model.quantize or ""}
    where |= {"offload_checkpoints": config.memory.offload_checkpoints, "tiled_mlp": config.memory.tiled_mlp}
    where |= {"save_attention": config.memory.save_attention}
    where |= {"offload_optimizer": config.zero.offload_optimizer, "offload_param": config.zero.offload_param}
    if mesh.is_main:
        print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    baseline: dict[int, float] = {}
    for row in rows(config, options, engine, plan, mesh):
        if not mesh.is_main:
            continue
        print(line(row, baseline), flush=True)
        append(options.csv, [where | dict.fromkeys(COLUMNS, "") | row])
    stop_mesh()
    return True


COLUMNS = ["ms_p20", "ms_p50", "ms_p80", "first_step_s", "peak_gb", "host_gb", "tokens_per_second"]
COLUMNS += ["tflops_executed", "tflops_dense", "mfu"]
COLUMNS += ["sent_bytes_per_layer", "ulysses_bytes_per_layer"]


def line(row: dict, baseline: dict[int, float]) -> str:
    """A row as a line of text, with the speed-up over the first row of the same length."""
    head = f"{row['num_tokens']:>9,} {row['attention']:<6}{row['retention']:<6g}"
    if isinstance(row["ms_p50"], str):
        return f"{head} {row['ms_p50']}"
    speedup = baseline.setdefault(row["num_tokens"], row["ms_p50"]) / row["ms_p50"]
    return (
        f"{head}{row['ms_p50'] / 1e3:>8.2f} s a step (first {row['first_step_s']:.1f} s){speedup:>7.2f}x"
        f"{row['tokens_per_second']:>10,.0f} tokens/s{row.get('tflops_executed', math.nan):>8.1f} TFLOPS"
        f"{row['peak_gb']:>7.1f} GB{row['host_gb']:>7.1f} GB on the host"
        f"{row['sent_bytes_per_layer'] / 1e6:>9.1f} MB sent a layer"
    )


if __name__ == "__main__":
    chosen = arguments()
    sys.argv = [sys.argv[0], *chosen.overrides]
    leave(run_command(lambda config: benchmark(config, chosen)))
