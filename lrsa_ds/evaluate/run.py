"""An evaluation from configuration to figures: each rank answers its share of the samples; it can be resumed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from transformers import PreTrainedModel

from lrsa_ds.config import load_settings, save_settings
from lrsa_ds.data.tokenizer import Tokenizer, load_tokenizer
from lrsa_ds.directories.claim import claim
from lrsa_ds.directories.layout import EVALUATE, check_directory, mark_directory, remove_run
from lrsa_ds.directories.lock import check_lock
from lrsa_ds.dtypes import dtype_of
from lrsa_ds.errors import require
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.evaluate.evaluator import Evaluator, Mode, Sample, Score, modes
from lrsa_ds.evaluate.page import predictions_page
from lrsa_ds.evaluate.report import draw_results, results_table
from lrsa_ds.evaluate.results import (
    RESULTS,
    cache_name,
    collect,
    key_of,
    part_of,
    read_results,
    shown_predictions,
    summary,
)
from lrsa_ds.evaluate.telemetry import WHEN, measure_samples, telemetry_cache
from lrsa_ds.inputs import check_inputs
from lrsa_ds.labels import retention_name
from lrsa_ds.layers import AnyConfig, OfLRSA, describe, in_model, of_lrsa
from lrsa_ds.logs.journal import JSONLines, Progress
from lrsa_ds.logs.metrics import RunLogger
from lrsa_ds.logs.provenance import provenance
from lrsa_ds.logs.trackers import check_trackers
from lrsa_ds.models.loading import empty_model, load_model
from lrsa_ds.models.patch import apply_lrsa, check_supported, to_device
from lrsa_ds.models.quantized import check_quantizable, check_quantize
from lrsa_ds.models.rope import check_reach
from lrsa_ds.models.stop_tokens import set_stop_tokens
from lrsa_ds.models.structure import layers_of
from lrsa_ds.parallel.mesh import Mesh, start_mesh, stop_mesh
from lrsa_ds.process.signals import StopRequest
from lrsa_ds.settings.attention import require_compression
from lrsa_ds.settings.run import LogConfig
from lrsa_ds.telemetry.report import report_telemetry

SETTINGS = "config.yaml"
# Settings that may differ when an evaluation resumes in the same directory: more results, or how they are shown.
MAY_DIFFER = ("run_name", "output_dir", "overwrite", "log", "tasks", "lengths", "num_samples", "longbench", "ruler")
MAY_DIFFER += ("telemetry", "telemetry_greedy")


class SampleSource(Protocol):
    """The source of samples; see `recipes.samples.Samples`."""

    def items(self) -> list[tuple[str, int, int]]: ...

    def sample(self, task: str, length: int, index: int) -> Sample: ...

    def check(self) -> None: ...


def evaluate(
    config: EvaluateConfig, make_samples: Callable[[EvaluateConfig, Tokenizer], SampleSource], score: Score
) -> None:
    """Runs the complete evaluation on this rank.

    Raises:
        LRSAError: the configuration is not supported, or `output_dir` has the results of another configuration.
    """
    StopRequest()
    check_trackers(config.log)
    check_quantize(config.model)
    structure = empty_model(config.model)
    check_supported(structure)
    check_quantizable(config.model, structure)
    check_reach(structure.config, config.model.rope, "lengths", max(config.lengths))
    trained = getattr(structure.config, "lrsa", None)
    layers = layers_of(structure.config)
    caches = in_model(config.cache.caches(trained), layers)
    differing = config.cache.differing(trained, layers)
    wanted = modes(config.cache.prefill, config.cache.retentions, differing)
    settings = asdict(config)
    if config.telemetry:
        cache, wanted = telemetry_cache(config, trained, layers), []
    else:
        cache = None
        _check_lengths(config, trained, wanted, differing)
    _check_directory(config, settings)
    tokenizer = load_tokenizer(config.model)
    samples = make_samples(config, tokenizer)
    samples.check()
    # Ranks meet only at the end of the work, and some may have finished long before.
    mesh = start_mesh(timeout=timedelta(days=7))
    num_parameters = sum(p.numel() for p in structure.parameters())
    plan = _Plan(config, caches, differing, wanted, cache, num_parameters, tokenizer, samples, score)

    def enter(directory: Path) -> None:
        _enter(directory, config, settings)

    with claim(config.output_dir, config.run_name, mesh, enter) as (directory, _):
        _evaluate_in(directory, plan, mesh)
    stop_mesh()


@dataclass(frozen=True)
class _Plan:
    """Everything known about an evaluation before it claims its directory.

    Args:
        attention: the common settings of its caches.
        differing: its caches whose layers differ, by name.
        measured: the cache that telemetry measures, instead of answers under those `wanted`; None without telemetry.
    """

    config: EvaluateConfig
    attention: AnyConfig
    differing: dict[str, AnyConfig]
    wanted: list[Mode]
    measured: OfLRSA | None
    num_parameters: int
    tokenizer: Tokenizer
    samples: SampleSource
    score: Score


def _evaluate_in(directory: Path, plan: _Plan, mesh: Mesh) -> None:
    """The evaluation in its directory, which this run has claimed."""
    config, samples, attention = plan.config, plan.samples, plan.attention
    done = {key_of(row) for row in read_results(directory)}
    quiet = replace(config.log, progress=False)  # the logger shows progress of training steps
    about = provenance(mesh.world_size, plan.num_parameters, mesh.device_name)
    logger = RunLogger(directory, quiet, asdict(config), about, config.run_name, 0, enabled=mesh.is_main)
    failed = True
    try:
        missing = _missing(samples, plan.wanted, done)
        for line in _description(config, attention, plan.wanted, samples, missing, directory, mesh):
            logger.message(line)
        if plan.measured is not None:
            _measure(directory, plan, plan.measured, mesh, logger)
        elif missing:
            evaluator = Evaluator(_model(plan, mesh), plan.tokenizer, attention, plan.score, plan.differing)
            _work(evaluator, samples, missing, directory, mesh, config.log)
        dist.barrier()
        if mesh.is_main and plan.measured is None:
            _report(config, collect(directory), directory, logger)
        failed = False
    finally:
        logger.close(failed=failed)


def _model(plan: _Plan, mesh: Mesh) -> PreTrainedModel:
    """The model with LRSA attention, on the device."""
    settings = plan.config.model
    model = apply_lrsa(load_model(settings, dtype_of(settings.dtype)), plan.attention)
    model = to_device(model, mesh.device).eval()
    set_stop_tokens(model, plan.tokenizer, settings, plan.config.data.chat_template)
    return model


def _measure(directory: Path, plan: _Plan, cache: OfLRSA, mesh: Mesh, logger: RunLogger) -> None:
    """Telemetry over all samples with an answer."""
    config = plan.config
    samples = [plan.samples.sample(*item) for item in plan.samples.items() if item[0] != "perplexity"]
    found = measure_samples(
        _model(plan, mesh), plan.tokenizer, samples, cache, config.telemetry_greedy, mesh, config.log.progress
    )
    if mesh.is_main:
        report_telemetry(found, WHEN, 0, directory, config.run_name, logger)


def _check_lengths(
    config: EvaluateConfig, trained: dict | None, wanted: list[Mode], differing: dict[str, AnyConfig]
) -> None:
    """Refuses prompts that are too short for any cache to drop anything: every score would be the dense one."""
    for mode in wanted:
        attention = differing[mode.layers] if mode.layers else config.cache.attention(trained, mode.retention)
        for length in config.lengths if mode.prefill != "dense" and not attention.is_dense else ():
            require_compression("lengths", length, attention, "cache", "cache.prefill=[dense]")


def _check_directory(config: EvaluateConfig, settings: dict) -> None:
    """Refuses a directory that is not ours, or has results of another configuration; names the differences."""
    if config.output_dir is None:
        return
    directory = Path(config.output_dir).expanduser()
    check_inputs(directory, config.model, config.data, longbench=config.longbench, ruler=config.ruler)
    # A directory from before the mark existed that has only results is resumed.
    check_directory(directory, EVALUATE, may_adopt=not config.overwrite and (directory / RESULTS).exists())
    check_lock(directory)
    if config.overwrite or not (directory / SETTINGS).exists():
        return
    there = load_settings(directory / SETTINGS)
    differing = [key for key in settings if key not in MAY_DIFFER and _fixed(settings[key]) != _fixed(there.get(key))]
    require(
        not differing,
        f"output_dir={directory} holds results of another configuration, which differs in {', '.join(differing)}: "
        "choose another directory, or set overwrite=true.",
    )


def _fixed(value):
    """A setting without values that may be added: more retentions and prefill modes only add rows.

    A key that did not exist in an earlier release counts as not set.
    """
    if isinstance(value, dict):
        may_grow = ("retentions", "prefill")
        return {key: item for key, item in value.items() if key not in may_grow and item not in (None, {})}
    return value


def _enter(directory: Path, config: EvaluateConfig, settings: dict) -> None:
    """Prepares the directory that this evaluation has claimed: all rows are in one file."""
    _check_directory(config, settings)
    mark_directory(directory, EVALUATE)
    if config.overwrite:
        remove_run(directory, EVALUATE)
    save_settings(settings | {"output_dir": str(directory)}, directory / SETTINGS)
    collect(directory)


def _missing(samples: SampleSource, wanted: list[Mode], done: set[tuple]) -> list[tuple[tuple, list[Mode]]]:
    """All samples that are not done, with all their modes: agreement with the dense mode needs them together."""
    missing = []
    for item in samples.items():
        expected = [m for m in wanted if not (item[0] == "perplexity" and m.prefill == "after")]
        if any((*item, m.prefill, m.retention, m.layers) not in done for m in expected):
            missing.append((item, expected))
    return missing


def _work(
    evaluator: Evaluator,
    samples: SampleSource,
    missing: list[tuple[tuple, list[Mode]]],
    directory: Path,
    mesh: Mesh,
    log: LogConfig,
) -> None:
    mine = missing[mesh.rank :: mesh.world_size]
    total = len(missing)
    progress = Progress(total, unit="sample") if mesh.is_main and log.progress else None
    file = JSONLines(part_of(directory, mesh.rank))
    try:
        for number, (item, wanted) in enumerate(mine):
            if progress:  # other ranks are about as far
                progress.show({"step": min(number * mesh.world_size, total)})
            for row in evaluator.rows(samples.sample(*item), wanted):
                file.write(row)
        if progress:
            progress.show({"step": total})
    finally:  # an error is printed below the bar
        file.close()
        if progress:
            progress.close()


def _description(
    config: EvaluateConfig,
    attention: AnyConfig,
    wanted: list[Mode],
    samples: SampleSource,
    missing: list,
    directory: Path,
    mesh: Mesh,
) -> list[str]:
    total = len(samples.items())
    caches = ", ".join(cache_name(mode.prefill, mode.retention, mode.layers) for mode in wanted)
    done = f"{total - len(missing)} of them done before; seed {config.seed}; greedy decoding"
    if config.telemetry:
        caches = f"telemetry at retention {retention_name(min(config.cache.retentions))} in every layer"
        done = f"seed {config.seed}; teacher forcing"
    return [
        f"{config.run_name}: {config.model.name or 'random weights'} on {mesh.world_size} × {mesh.device_name}",
        f"caches: sink {attention.sink_size}, lag {attention.lag_size}; {caches}"
        + (f"; trained with {describe(attention)}" if len(of_lrsa(attention).layers) > 1 else ""),
        f"{total} samples, {done}",
        f"output: {directory}",
    ]


def _report(config: EvaluateConfig, samples: list[dict], directory: Path, logger: RunLogger) -> None:
    rows = summary(samples)
    table = results_table(rows)
    logger.message(table)
    (directory / "results.txt").write_text(table + "\n", encoding="utf-8")
    (directory / "results.html").write_text(predictions_page(samples, config.run_name), encoding="utf-8")
    logger.results(rows, shown_predictions(samples), draw_results(rows, samples, directory, config.run_name))
