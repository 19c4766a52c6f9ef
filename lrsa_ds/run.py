"""A run from configuration to exported model: check, start, evaluate, train, evaluate, export."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

from lrsa_ds import checkpoint
from lrsa_ds.config import TrainConfig, require, save_settings
from lrsa_ds.data.stream import TrainStream, make_loader
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.evaluation import evaluate
from lrsa_ds.loss import TargetLoss
from lrsa_ds.metrics import RunLogger, check_wandb
from lrsa_ds.model import apply_lrsa, check_supported, empty_model, enable_checkpointing, layer_classes, load_model
from lrsa_ds.parallel.mesh import Mesh, check_world, start_mesh, stop_mesh
from lrsa_ds.parallel.sequence import check_heads
from lrsa_ds.parallel.shard import check_shards
from lrsa_ds.parallel.ulysses import check_dense_heads
from lrsa_ds.parallel.zero import deepspeed_config, make_engine
from lrsa_ds.report import draw_evaluation, evaluation_table
from lrsa_ds.trainer import Engine, Trainer, cosine_schedule


@dataclass(frozen=True)
class Plan:
    """All that can be known, and all that can be wrong, before a process group starts."""

    dtype: torch.dtype
    num_parameters: int
    tokenizer: object
    data: object


def prepare(config: TrainConfig, procedure: ModuleType) -> Plan:
    """Checks everything that can be checked on one process, at the cost of reading the data's head.

    Raises:
        LRSAError: the first thing that is wrong, in one sentence.
    """
    use_cuda = torch.cuda.is_available()
    require(
        config.attention.backend != "flex" or use_cuda,
        "attention.backend=flex needs a CUDA device, and there is none: use auto or chunked.",
    )
    check_wandb(config.log)
    dtype = {"auto": torch.bfloat16 if use_cuda else torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = dtype[config.model.dtype]
    structure = empty_model(config.model)
    check_supported(structure)
    _check_parallel(config, structure)
    num_parameters = sum(p.numel() for p in structure.parameters())
    checkpoint.check_output(config, num_parameters, dtype.itemsize)
    tokenizer = load_tokenizer(config.model)
    vocabulary = structure.get_input_embeddings().num_embeddings
    require(
        len(tokenizer) <= vocabulary,
        f"model.tokenizer has {len(tokenizer)} tokens, and the model knows {vocabulary}: they do not belong together.",
    )
    return Plan(dtype, num_parameters, tokenizer, procedure.prepare(config, tokenizer))


def _check_parallel(config: TrainConfig, structure: torch.nn.Module) -> None:
    """Whether the sequences of the run can be shared as `parallel.sp_size` asks, in training and in evaluation."""
    size, attention = config.parallel.sp_size, config.attention
    if size == 1:
        return
    architecture = structure.config.get_text_config()
    check_world(size)
    check_heads(architecture.num_attention_heads, size)
    row = config.seq_len * config.optim.micro_batch
    for retention in {*attention.retentions, *config.eval.retentions}:
        settings = attention.with_retention(retention)
        if settings.is_dense:
            check_dense_heads(architecture.num_key_value_heads, size)
        else:
            check_shards(row, size, settings, "seq_len * optim.micro_batch")


def train(config: TrainConfig, procedure: ModuleType, notes: list[str]) -> None:
    """Runs the whole job on this rank. `notes` are sentences about the configuration that rank 0 shows first."""
    plan = prepare(config, procedure)
    mesh = start_mesh(config.parallel.sp_size)
    torch.manual_seed(config.seed)
    output = checkpoint.open_output(config, mesh)
    settings = asdict(config) | {"output_dir": str(output)}
    if mesh.is_main:
        save_settings(settings, output / "config.yaml")
    logger = RunLogger(output, config.log, settings, config.run_name, config.optim.num_steps, enabled=mesh.is_main)
    failed = True
    try:
        for note in [*notes, *_describe(config, plan, mesh, output)]:
            logger.message(note)
        _run(config, plan, mesh, output, logger)
        failed = False
    finally:
        logger.close(failed=failed)
    if mesh.is_main:
        checkpoint.mark_completed(output)
    stop_mesh()


def _run(config: TrainConfig, plan: Plan, mesh: Mesh, output: Path, logger: RunLogger) -> None:
    engine = build_engine(config, plan)
    data, rows = plan.data, []

    def report(when: str) -> None:
        rows.extend(evaluate(engine, config, mesh, data.validation_examples(), data.pad_id, when))
        if mesh.is_main:
            _report(config, rows, when, output, logger)

    if config.eval.before:
        report("before")
    build_trainer(config, plan, mesh, engine).fit(logger.step)
    if config.eval.after:
        report("after")
    if config.checkpoint.export:
        checkpoint.export_model(engine, plan.tokenizer, config, output, mesh)
        logger.message(f"model: {output / checkpoint.MODEL_DIRECTORY}")


def build_engine(config: TrainConfig, plan: Plan) -> Engine:
    """The model with LRSA attention and its loss, in DeepSpeed's engine."""
    sharded = deepspeed_config(config, plan.dtype) if config.zero.stage == 3 else None
    model = apply_lrsa(load_model(config.model, plan.dtype, sharded), config.attention.at_step(0))
    if config.activation_checkpointing:
        enable_checkpointing(model)
    loss = TargetLoss(model, config.loss_chunk_size)
    return make_engine(config, loss, plan.dtype, cosine_schedule(config.optim), layer_classes(model))


def build_trainer(config: TrainConfig, plan: Plan, mesh: Mesh, engine: Engine) -> Trainer:
    """The training loop over this rank's share of the sequences."""
    per_step = config.optim.micro_batch * config.optim.grad_accum
    stream = TrainStream(plan.data.sequences_of_epoch, per_step, mesh.dp_rank, mesh.dp_size)
    return Trainer(config, mesh, engine, iter(make_loader(stream, config.data.num_workers)))


def _report(config: TrainConfig, rows: list[dict], when: str, output: Path, logger: RunLogger) -> None:
    """The table in the terminal and on disk, the picture, and the rows of this evaluation in the logs."""
    table = evaluation_table(rows)
    logger.message(table)
    (output / "evaluation.txt").write_text(table + "\n", encoding="utf-8")
    picture = output / "evaluation.png"
    draw_evaluation(rows, picture, f"{config.run_name}: answers under a compressed KV cache")
    logger.evaluation([row for row in rows if row["when"] == when], picture)


def _describe(config: TrainConfig, plan: Plan, mesh: Mesh, output: Path) -> list[str]:
    attention, optim = config.attention, config.optim
    retention = attention.retentions[0] if len(attention.retentions) == 1 else attention.retentions
    kind = (
        "dense attention"
        if attention.kind == "dense"
        else f"LRSA, sink {attention.sink_size}, lag {attention.lag_size}, retention {retention}"
    )
    sequences = mesh.dp_size * optim.micro_batch * optim.grad_accum
    name = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    shared = f", {mesh.sp_size} ranks to a sequence" if mesh.sp_size > 1 else ""
    return [
        f"{config.run_name}: {plan.num_parameters / 1e6:,.1f}M parameters in {str(plan.dtype).removeprefix('torch.')} "
        f"on {mesh.world_size} × {name}, ZeRO stage {config.zero.stage}{shared}",
        f"attention: {kind}",
        f"{optim.num_steps} steps of {sequences} × {config.seq_len:,} tokens, peak learning rate {optim.lr:g}",
        f"output: {output}",
    ]
