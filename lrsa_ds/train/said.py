"""What a run says of itself: before its first step, about the time that is left, of its scores, and at its end."""

from collections.abc import Sequence
from pathlib import Path

from lrsa_ds.compression import cache_lines
from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.flops import forward_flops
from lrsa_ds.data.packing import IGNORE, Example
from lrsa_ds.dtypes import dtype_name
from lrsa_ds.layers import AnyConfig
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
from lrsa_ds.train.throughput import describe_peak, seconds_of_flop

PICTURE = "evaluation.png"
# Passes without gradients that take as long as a step, for each sequence. A backward pass takes as long as two. The
# fourth is the second forward pass under activation checkpointing; without it, the memory of what is saved and the
# optimizer take about as long (measured on two CPU cores: 3.5 to 4.2 passes in all).
PASSES_OF_STEP = 4
GUESSED_WIDTH = 1024  # of a model whose shape is not known


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
    examples = plan.data.validation_examples()
    caches = [cache.config for cache in caches_of(config.attention, config.eval, plan.layers)]
    num_targets = sum(label != IGNORE for example in examples for label in example.labels)
    num_slots = config.seq_len * num_targets / max(1, sum(len(example.labels) for example in examples))
    flops_of_pass = _flops_of_pass(config, plan, num_slots, caches)
    # In passes of the evaluation, whose settings of attention may be others.
    of_sequence = PASSES_OF_STEP * _flops_of_pass(config, plan, num_slots, plan.turns) / flops_of_pass
    evaluated, measured = _num_sequences(examples, config, mesh), 0.0
    if config.eval.telemetry:
        chosen = some_of_each_task(examples, config.eval.telemetry_examples)
        of_example = num_passes(len(plan.layers.taken), config.eval.telemetry_greedy)
        measured = _num_sequences(chosen, config, mesh) * of_example
    width = plan.shape.num_heads * plan.shape.head_dims.keys if plan.shape else GUESSED_WIDTH
    return Remaining(
        num_steps=optim.num_steps,
        passes_of_step=of_sequence * optim.micro_batch * optim.grad_accum,
        passes_of_evaluation=evaluated * len(caches),
        is_evaluated_before=config.eval.before and plan.resume is None,
        is_evaluated_after=config.eval.after,
        seconds_of_pass=flops_of_pass / mesh.sp_size * seconds_of_flop(width, plan.dtype, mesh.device),
        evaluated_every=config.eval.every,
        passes_of_telemetry=measured,
        first_step=plan.resume.step if plan.resume else 0,
    )


def _flops_of_pass(config: TrainConfig, plan: Plan, num_slots: float, settings: Sequence[AnyConfig]) -> float:
    """Operations of a pass without gradients over a sequence with `num_slots` logits, in the mean of the settings."""
    if plan.shape is None:
        return 2.0 * plan.num_parameters * config.seq_len
    each = [forward_flops(plan.shape, [config.seq_len], num_slots, of).total for of in settings]
    return sum(each) / len(each)


def _num_sequences(examples: list[Example], config: TrainConfig, mesh: Mesh) -> float:
    """Sequences that the examples fill, for each replica."""
    return max(1.0, sum(len(example.input_ids) for example in examples) / config.seq_len) / mesh.dp_size


def conclusion(config: TrainConfig, rows: list[dict], directory: Path) -> list[str]:
    """What the run has found and what to do next, for its end."""
    return findings(rows, directory / PICTURE, directory / output.MODEL_DIRECTORY if config.checkpoint.export else None)
