"""What a run says of itself: before its first step, about the time that is left, of its scores, and at its end."""

from pathlib import Path

from lrsa_ds.compression import cache_lines
from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import Example
from lrsa_ds.dtypes import dtype_name
from lrsa_ds.logs.findings import findings
from lrsa_ds.logs.metrics import RunLogger
from lrsa_ds.logs.remaining import Remaining
from lrsa_ds.logs.report import draw_evaluation, evaluation_table
from lrsa_ds.models.tiling import describe_levers
from lrsa_ds.objectives import check_objective
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.train import output
from lrsa_ds.train.plan import Plan
from lrsa_ds.train.scoring import Evaluation
from lrsa_ds.train.throughput import describe_peak

PICTURE = "evaluation.png"


def report(config: TrainConfig, rows: list[dict], new: Evaluation, directory: Path, logger: RunLogger) -> None:
    """Writes the table to the terminal and to disk, draws the figure, and logs the newest results."""
    table = evaluation_table(rows)
    logger.message(table)
    (directory / "evaluation.txt").write_text(table + "\n", encoding="utf-8")
    picture = directory / PICTURE
    draw_evaluation(rows, picture, f"{config.run_name}: answers under a compressed KV cache")
    logger.evaluation(new.scores, new.predictions, picture, new.answers)


def describe(config: TrainConfig, plan: Plan, mesh: Mesh, directory: Path) -> list[str]:
    """Lines about the run before its first step."""
    attention, optim = config.attention, config.optim
    lrsa = f"LRSA, sink {attention.sink_size}, lag {attention.lag_size}, {attention.described(plan.layers)}"
    kind = "dense attention" if attention.kind == "dense" else lrsa
    sequences = mesh.dp_size * optim.micro_batch * optim.grad_accum
    no_peak = describe_peak(config, mesh.device_name)
    shared = f", {mesh.sp_size} ranks to a sequence" if mesh.sp_size > 1 else ""
    packed = f", matrices in {config.model.quantize}," if config.model.quantize else ""
    lines = [
        f"{config.run_name}: {plan.num_parameters / 1e6:,.1f}M parameters in {dtype_name(plan.dtype)}{packed} "
        f"on {mesh.world_size} × {mesh.device_name}, ZeRO stage {config.zero.stage}{shared}",
        f"attention: {kind}",
        *filter(None, [check_objective(config).describe(config), describe_levers(config), no_peak]),
        *cache_lines(config.seq_len, plan.turns, plan.report.share_short, plan.report.long_answers()),
        f"{optim.num_steps} steps of {sequences} × {config.seq_len:,} tokens, peak learning rate {optim.lr:g}",
        *plan.report.lines(sequences, optim.num_steps),
        f"output: {directory}",
    ]
    if plan.resume is not None:
        was = f", which {plan.resume.world_size} ranks wrote" if plan.resume.world_size != mesh.world_size else ""
        lines.append(f"resuming after step {plan.resume.step}, from {plan.resume.directory}{was}")
        lines += filter(None, [plan.resume.changed])
    return lines


def remaining(config: TrainConfig, mesh: Mesh, examples: list[Example], num_caches: int) -> Remaining:
    """What follows each phase of a run that evaluates `examples` under so many caches."""
    optim = config.optim
    # A backward pass costs two forward passes, and layers under checkpointing run once more.
    of_sequence = 4 if config.activation_checkpointing else 3
    num_sequences = max(1.0, sum(len(example.input_ids) for example in examples) / config.seq_len) / mesh.dp_size
    return Remaining(
        num_steps=optim.num_steps,
        passes_of_step=of_sequence * optim.micro_batch * optim.grad_accum,
        passes_of_evaluation=num_sequences * num_caches,
        is_evaluated_after=config.eval.after,
    )


def conclusion(config: TrainConfig, rows: list[dict], directory: Path) -> list[str]:
    """What the run has found and what to do next, for its end."""
    return findings(rows, directory / PICTURE, directory / output.MODEL_DIRECTORY if config.checkpoint.export else None)
