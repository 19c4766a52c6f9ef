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
from lrsa_ds.settings.caches import caches_of
from lrsa_ds.telemetry.measure import num_passes, some_of_each_task
from lrsa_ds.train import output
from lrsa_ds.train.plan import Plan
from lrsa_ds.train.scoring import Evaluation
from lrsa_ds.train.throughput import describe_peak, guessed_seconds

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


def remaining(config: TrainConfig, plan: Plan, mesh: Mesh) -> Remaining:
    """The phases of a run before the first of them, with a guess of their time; it takes a fraction of a second."""
    optim = config.optim
    # A backward pass costs two forward passes, and layers under checkpointing run once more.
    of_sequence = 4 if config.activation_checkpointing else 3
    examples = plan.data.validation_examples()
    num_caches = len(caches_of(config.attention, config.eval, plan.layers))
    evaluated, measured = _num_sequences(examples, config, mesh), 0.0
    if config.eval.telemetry:
        chosen = some_of_each_task(examples, config.eval.telemetry_examples)
        of_example = num_passes(len(plan.layers.taken), config.eval.telemetry_greedy)
        measured = _num_sequences(chosen, config, mesh) * of_example
    flops_of_pass = 2 * plan.num_parameters * config.seq_len / mesh.sp_size
    return Remaining(
        num_steps=optim.num_steps,
        passes_of_step=of_sequence * optim.micro_batch * optim.grad_accum,
        passes_of_evaluation=evaluated * num_caches,
        is_evaluated_before=config.eval.before and plan.resume is None,
        is_evaluated_after=config.eval.after,
        seconds_of_pass=guessed_seconds(flops_of_pass, plan.dtype, mesh.device),
        evaluated_every=config.eval.every,
        passes_of_telemetry=measured,
        first_step=plan.resume.step if plan.resume else 0,
    )


def _num_sequences(examples: list[Example], config: TrainConfig, mesh: Mesh) -> float:
    """Sequences that the examples fill, for each replica."""
    return max(1.0, sum(len(example.input_ids) for example in examples) / config.seq_len) / mesh.dp_size


def conclusion(config: TrainConfig, rows: list[dict], directory: Path) -> list[str]:
    """What the run has found and what to do next, for its end."""
    return findings(rows, directory / PICTURE, directory / output.MODEL_DIRECTORY if config.checkpoint.export else None)
