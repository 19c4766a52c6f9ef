"""A run from configuration to exported model: start or resume, evaluate, train, evaluate, export."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from lrsa_ds.compression import short_documents_sentence
from lrsa_ds.config import TrainConfig, save_settings
from lrsa_ds.data.procedure import Procedure
from lrsa_ds.data.stream import TrainStream, make_loader
from lrsa_ds.directories.claim import claim
from lrsa_ds.errors import Stopped
from lrsa_ds.labels import rows_of_smallest
from lrsa_ds.layers import smallest_of
from lrsa_ds.logs.journal import keep_rows_until, read_rows
from lrsa_ds.logs.metrics import ANSWERS, PREDICTIONS, RunLogger
from lrsa_ds.logs.provenance import provenance
from lrsa_ds.models.liger import apply_liger
from lrsa_ds.models.loading import load_model
from lrsa_ds.models.patch import PreTrainedModel, apply_lrsa, layer_classes
from lrsa_ds.models.stop_tokens import set_stop_tokens
from lrsa_ds.models.tiling import num_tiles, tile_mlps
from lrsa_ds.objectives import make_objective
from lrsa_ds.parallel.mesh import Mesh, rank, start_mesh, stop_mesh
from lrsa_ds.parallel.watch import Watch
from lrsa_ds.parallel.zero import deepspeed_config, make_engine
from lrsa_ds.process.signals import REASONS, StopRequest
from lrsa_ds.telemetry.report import report_telemetry
from lrsa_ds.train import checkpoint, output
from lrsa_ds.train.plan import Plan, find_resume, prepare
from lrsa_ds.train.profiling import StepProfiler
from lrsa_ds.train.said import conclusion, describe, remaining, report
from lrsa_ds.train.saving import CheckpointSaver
from lrsa_ds.train.scoring import Moment, evaluate, look_inside
from lrsa_ds.train.trainable import make_trainable
from lrsa_ds.train.trainer import Engine, Trainer, cosine_schedule


def train(config: TrainConfig, procedure: Procedure, notes: list[str]) -> None:
    """Runs the complete job on this rank. `notes` are sentences about the configuration that rank 0 prints first.

    Raises:
        LRSAError: any mistake that the user can correct.
        Stopped: a signal has ended the run, after a checkpoint.
    """
    stop = StopRequest()
    if rank() == 0 and config.log.progress:
        print("reading the data and the settings of the model", file=sys.stderr, flush=True)
    plan = prepare(config, procedure)
    config = plan.config
    # Our watchdog names the rank that hangs, so it has to fire before torch's, which does not.
    patience = timedelta(seconds=3 * config.parallel.timeout) if config.parallel.timeout else timedelta(days=30)
    join = timedelta(seconds=config.parallel.timeout) if config.parallel.timeout else patience
    mesh = start_mesh(config.parallel.sp_size, patience, config.parallel.exchange, join)
    torch.manual_seed(config.seed)

    def enter(directory: Path) -> checkpoint.ResumePoint | None:
        return output.enter_output(directory, config, lambda: find_resume(config, plan))

    with claim(config.output_dir, config.run_name, mesh, enter) as (directory, resume):
        _train_in(directory, config, replace(plan, resume=resume), mesh, stop, notes)
    stop_mesh()


def _train_in(
    directory: Path, config: TrainConfig, plan: Plan, mesh: Mesh, stop: StopRequest, notes: list[str]
) -> None:
    """The run in its directory, which this run has claimed."""
    settings = asdict(config) | {"output_dir": str(directory)}
    first_step = plan.resume.step if plan.resume else 0
    kept_until = first_step if plan.resume else -1  # without a checkpoint, earlier rows are dropped
    files = (directory / name for name in ("metrics.jsonl", PREDICTIONS, ANSWERS))
    earlier, *_ = [keep_rows_until(file, kept_until, mesh.is_main) for file in files]
    if mesh.is_main:
        save_settings(settings, directory / "config.yaml")
    watch = Watch(directory, mesh, config.parallel.timeout)
    about = {"step": first_step} | provenance(mesh.world_size, plan.num_parameters, mesh.device_name)
    steps = config.optim.num_steps
    logger = RunLogger(directory, config.log, settings, about, config.run_name, steps, enabled=mesh.is_main)
    failed = True
    try:
        for note in [*notes, *describe(config, plan, mesh, directory)] if mesh.is_main else []:
            logger.message(note)
        logger.data(plan.report.row())
        if mesh.is_main and config.log.progress:
            logger.expect(remaining(config, plan, mesh))
        scores = [row for row in earlier if row["kind"] == "eval"]
        setup = _Setup(config=config, plan=plan, mesh=mesh, directory=directory, logger=logger, watch=watch, stop=stop)
        _Run(setup, scores).all()
        stop.accept()  # from here on a signal no longer stops the run
        failed = False
    finally:
        logger.close(failed=failed)
        watch.close()
    if mesh.is_main:
        output.mark(directory, output.COMPLETED)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Setup:
    """The inputs of a run once it has claimed its directory: settings, plan, and the objects that it reports to."""

    config: TrainConfig
    plan: Plan
    mesh: Mesh
    directory: Path
    logger: RunLogger
    watch: Watch
    stop: StopRequest


class _Run:
    """The run between its start and its end. Loads the model, and its checkpoint if the run resumes.

    Args:
        scores: rows of metrics.jsonl, evaluations from before an interruption.
    """

    def __init__(self, setup: _Setup, scores: list[dict]):
        config, plan, mesh = setup.config, setup.plan, setup.mesh
        self.config, self.plan, self.mesh, self.directory = config, plan, mesh, setup.directory
        self.logger, self.watch, self.stop = setup.logger, setup.watch, setup.stop
        self.rows = [{key: value for key, value in row.items() if key != "kind"} for row in scores]
        self.watch.doing("loading the model")
        self.engine = build_engine(config, plan, mesh)
        point = plan.resume
        # A base in 4 bits is read and quantized anew, with the same result.
        trained_only = config.model.quantize is not None
        if point is not None:
            checkpoint.load_checkpoint(self.engine, point, mesh, trained_only)
        # The last step, with the position of the data after it; and the last step in a checkpoint.
        self.place = (point.step, point.position) if point else (0, {})
        self.saved_step = self.place[0]
        self.profiler = StepProfiler(config.log.profile_steps if mesh.is_main else [], self.directory)
        save = config.checkpoint
        num_bytes = None if trained_only else plan.checkpoint_bytes
        self.saver = CheckpointSaver(self.engine, self.directory, save.keep, num_bytes, save.write, mesh)

    def all(self) -> None:
        """Evaluates, trains, evaluates and exports."""
        config = self.config
        if self.plan.resume is None and config.eval.before:
            self.evaluate("before", 0)
            self.telemetry("before", 0)
        self.stop.begin()
        trainer = build_trainer(config, self.plan, self.mesh, self.engine, self.watch.doing)
        trainer.fit(self.after_step, self.profiler.before)
        if self.mesh.is_main:
            self.summarize()
        if config.eval.after:
            self.evaluate("after", config.optim.num_steps)
            self.telemetry("after", config.optim.num_steps)
        if config.checkpoint.export:
            self.stop_if_asked()
            self.export(output.MODEL_DIRECTORY)
        if config.eval.after:
            self.logger.message("\n".join(conclusion(config, self.rows, self.directory)))

    def after_step(self, metrics: dict, position: dict) -> None:
        """Logs a step; then, if due, evaluates, keeps the best model, writes a checkpoint, or stops."""
        config, step = self.config, metrics["step"]
        self.place = step, position
        is_last = step == config.optim.num_steps
        self.profiler.after(step)
        self.logger.step(metrics)
        if config.eval.every and step % config.eval.every == 0 and not is_last:
            self.evaluate(f"step {step}", step)
            if config.checkpoint.best and self._is_best(f"step {step}"):
                self.export(output.BEST_DIRECTORY)
        # Some rank may have been asked to stop, or may still be writing: all ranks agree on it here.
        reason, busy = self.mesh.max([self.stop.number, float(self.saver.is_busy)])
        wants_stop = reason > 0
        if wants_stop:
            self.stop.accept()
        every = config.checkpoint.every
        is_due = wants_stop or (every and (step % every == 0 or is_last))
        if self.saver.is_pending and (is_due or not busy):
            self.finish_saving()
        if is_due:
            self.save(step, position)
            if wants_stop or is_last or not self.saver.is_background:
                self.finish_saving()
        if wants_stop:
            self._end(step, reason)

    def stop_if_asked(self) -> None:
        """After the last step: if any rank was asked to stop, writes a checkpoint and stops, as in training."""
        reason = self.mesh.max([self.stop.number])[0]
        if not reason:
            return
        self.stop.accept()
        step, position = self.place
        if self.saved_step != step:
            self.save(step, position)
            self.finish_saving()
        self._end(step, reason)

    def _end(self, step: int, reason: float) -> None:
        """Ends this rank for the reason that all ranks agreed on, given by its index in `REASONS`."""
        if self.mesh.is_main:
            output.mark(self.directory, output.STOPPED)
        name = REASONS[int(reason)]
        raise Stopped(f"stopped after step {step} by {name}: the same command resumes, in {self.directory}.")

    def summarize(self) -> None:
        """Logs the share of tokens trained on, over all steps, that were in documents too short for LRSA."""
        config = self.config
        steps = [row for row in read_rows(self.directory / "metrics.jsonl") if row["kind"] == "train"]
        steps = [row for row in steps if "num_short_tokens" in row]  # only steps with LRSA
        if steps:
            share = sum(row["num_short_tokens"] for row in steps) / sum(row["num_tokens"] for row in steps)
            self.logger.summary({"step": config.optim.num_steps, "short_token_share": share})
            sentence = short_documents_sentence(share, smallest_of(self.plan.turns), "the tokens trained on")
            if sentence:
                self.logger.message(sentence)

    def save(self, step: int, position: dict) -> None:
        config = self.config
        self.watch.doing(f"step {step}: writing a checkpoint")
        trainer = {
            "step": step,
            "position": position,
            "world_size": self.mesh.world_size,
            "settings": checkpoint.plain_settings(config),
            "data": self.plan.data.fingerprint(),
        }
        self.saver.start(trainer)
        self.saved_step = step

    def finish_saving(self) -> None:
        self.watch.doing("finishing a checkpoint")
        written = self.saver.finish()
        self.logger.checkpoint(written.step, written.path, written.waited, written.took)

    def evaluate(self, when: str, step: int) -> None:
        config, tokenizer = self.config, self.plan.tokenizer

        def on_batch(done: int, total: int) -> None:
            self.watch.doing(f"evaluation ({when})")
            self.logger.evaluating(when, done, total)
            if when == "after":
                self.stop_if_asked()

        examples = self.plan.data.validation_examples()
        found = evaluate(self.engine, config, self.mesh, examples, tokenizer, Moment(when, step), on_batch)
        self.rows.extend(found.scores)
        if self.mesh.is_main:
            report(config, self.rows, found, self.directory, self.logger)

    def telemetry(self, when: str, step: int) -> None:
        """If enabled, measures what each layer loses under the smallest cache, and reports it."""
        config = self.config
        if not config.eval.telemetry:
            return

        def on_pass(done: int, total: int) -> None:
            self.watch.doing(f"telemetry ({when})")
            self.logger.evaluating(f"telemetry {when}", done, total, unit="pass")
            if when == "after":
                self.stop_if_asked()

        examples = self.plan.data.validation_examples()
        found = look_inside(self.engine, config, self.mesh, examples, self.plan.tokenizer, on_pass)
        if self.mesh.is_main:
            report_telemetry(found, when, step, self.directory, config.run_name, self.logger)

    def _is_best(self, when: str) -> bool:
        """Whether this is the best of all evaluations during training so far, under the smallest cache."""
        scores: dict[str, list[float]] = {}
        for row in rows_of_smallest(self.rows):
            if row["when"].startswith("step"):
                scores.setdefault(row["when"], []).append(row["exact_match"] + row["token_accuracy"] / 1000)
        means = {name: sum(values) / len(values) for name, values in scores.items()}
        return means[when] == max(means.values())

    def export(self, name: str) -> None:
        self.watch.doing("exporting the model")
        output.export_model(self.engine, self.plan.tokenizer, self.config, self.directory / name, self.mesh)
        self.logger.message(f"model: {self.directory / name}")


def build_engine(config: TrainConfig, plan: Plan, mesh: Mesh) -> Engine:
    """The model with LRSA attention and its objective, in DeepSpeed's engine."""
    point = plan.resume
    universal = point is not None and checkpoint.needs_conversion(point, mesh)
    if universal:
        checkpoint.convert_checkpoint(point, config.zero.stage, mesh)
    model = _start_model(config, plan)
    set_stop_tokens(model, plan.tokenizer, config.model, config.data.chat_template)
    make_trainable(model, config)
    objective = make_objective(config, model, partial(_start_model, config, plan))
    return make_engine(config, objective, plan.dtype, cosine_schedule(config.optim), layer_classes(model), universal)


def _start_model(config: TrainConfig, plan: Plan) -> PreTrainedModel:
    """The model with LRSA attention before any training; random weights are the same in each call."""
    sharded = deepspeed_config(config, plan.dtype) if config.zero.stage == 3 else None
    torch.manual_seed(config.seed)
    model = apply_lrsa(load_model(config.model, plan.dtype, sharded), config.attention.turns)
    if config.model.liger_kernel:
        apply_liger(model)
    return tile_mlps(model, num_tiles(config))


def build_trainer(
    config: TrainConfig, plan: Plan, mesh: Mesh, engine: Engine, doing: Callable[[str], None] = lambda what: None
) -> Trainer:
    """The training loop over this rank's share of the sequences, from the position where the run resumes."""
    point = plan.resume
    per_step = config.optim.micro_batch * config.optim.grad_accum
    start = point.position if point else None
    stream = TrainStream(plan.data, per_step, mesh.dp_rank, mesh.dp_size, start)
    loader = iter(make_loader(stream, config.data.num_workers))
    return Trainer(config, mesh, engine, loader, point.step if point else 0, doing)
