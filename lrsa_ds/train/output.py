"""The output directory: who may write there, the exported model, and the mark of a finished run."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lrsa_ds.config import TrainConfig, load_settings
from lrsa_ds.directories.layout import (
    MODEL_FILES,
    TRAIN,
    check_directory,
    follow_umask,
    mark_directory,
    remove_files,
    remove_run,
    replace_folder,
)
from lrsa_ds.directories.lock import check_lock
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.logs.journal import read_rows
from lrsa_ds.models.adapters import BASE, base_name, base_weights, merge_adapters, save_adapters
from lrsa_ds.models.quantized import dequantized, quantized_as
from lrsa_ds.models.rope import raise_reach
from lrsa_ds.objectives import objective_of
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.train.checkpoint import ResumePoint, differing_settings, find_checkpoint

COMPLETED = "COMPLETED"
STOPPED = "STOPPED"
MODEL_DIRECTORY = "model"
BEST_DIRECTORY = "best"
# Files that a resumed run removes: they only served the run that wrote them.
OF_THE_MOMENT = (STOPPED, "ranks", *(f"{name}.partial" for name in (MODEL_DIRECTORY, BEST_DIRECTORY)))
WRAPPER_PREFIX = "lm."


def check_output(config: TrainConfig, num_parameters: int, bytes_per_parameter: int) -> ResumePoint | None:
    """Refuses a directory that is not ours, holds another run, is not writable, or has no room for the model.

    Returns:
        The checkpoint from which the run resumes, if the directory has one.
    """
    if config.output_dir is None:
        return None
    directory = Path(config.output_dir).expanduser()
    point = None if config.checkpoint.overwrite else find_checkpoint(directory)
    # A run may resume from checkpoints that were copied to a new directory, or that are older than the mark.
    check_directory(directory, TRAIN, may_adopt=point is not None and not (directory / COMPLETED).exists())
    check_lock(directory)
    if not config.checkpoint.overwrite:
        _check_unfinished(directory, config, point)
    check_room(directory, num_parameters * bytes_per_parameter if config.checkpoint.export else 0)
    return point


def _check_unfinished(directory: Path, config: TrainConfig, point: ResumePoint | None) -> None:
    """Raises LRSAError unless a run may resume in `directory`; `point` is its checkpoint, if any."""
    require(
        not (directory / COMPLETED).exists(),
        f"output_dir={directory} holds a finished run: choose another, or set checkpoint.overwrite=true.",
    )
    require(
        config.checkpoint.resume == "auto" or not (point or _is_begun(directory)),
        f"output_dir={directory} holds an unfinished run: set checkpoint.resume=auto to resume it, or "
        "checkpoint.overwrite=true to discard it.",
    )


def _is_begun(directory: Path) -> bool:
    """Whether a run has written rows about its training."""
    return any(row["kind"] in ("train", "eval", "checkpoint") for row in read_rows(directory / "metrics.jsonl"))


def check_begun(config: TrainConfig) -> None:
    """Raises LRSAError if the directory has rows of a run with other settings that has written no checkpoint."""
    if config.output_dir is None or config.checkpoint.overwrite:
        return
    directory = Path(config.output_dir).expanduser()
    if not _is_begun(directory) or not (directory / "config.yaml").exists():
        return
    differing = differing_settings(load_settings(directory / "config.yaml"), config)
    if config.optim.num_epochs is not None and "optim.num_epochs" not in differing:
        for key in ("optim.num_steps", "optim.warmup_steps"):
            differing.pop(key, None)  # counted again, perhaps for another number of ranks
    require(
        not differing,
        f"output_dir={directory} holds an unfinished run that left no checkpoint, with other settings, "
        f"{', '.join(differing.values())}: restore them, choose another output_dir, or set checkpoint.overwrite=true "
        "to start again.",
    )


def check_room(directory: Path, needed: int) -> None:
    """Creates `directory`; raises LRSAError unless it is writable and has `needed` bytes free, plus a margin."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise LRSAError(f"output_dir={directory} cannot be written: {error.strerror}.") from error
    needed = int(1.05 * needed) + 10_000_000
    require(
        free >= needed,
        f"output_dir={directory} has {free / 1e9:.2f} GB free, and the exported model needs {needed / 1e9:.2f} GB: "
        "choose another output_dir, or set checkpoint.export=false.",
    )


def enter_output(directory: Path, config: TrainConfig, check: Callable[[], ResumePoint | None]) -> ResumePoint | None:
    """Marks the directory that this run has claimed, and removes files of an earlier run.

    With `checkpoint.overwrite` these are all its files; for a resumed run, only those in `OF_THE_MOMENT`.

    Args:
        check: the checks of the directory in `prepare`, repeated: another run may have used it since.

    Returns:
        The result of `check`: the checkpoint from which the run resumes.
    """
    point = check()
    mark_directory(directory, TRAIN)
    remove_run(directory, TRAIN, only=None if config.checkpoint.overwrite else OF_THE_MOMENT)
    return point


def export_model(engine: DeepSpeedEngine, tokenizer, config: TrainConfig, final: Path, mesh: Mesh) -> None:
    """Writes the model in Hugging Face format, with its tokenizer and LRSA settings, to the directory `final`.

    The directory appears, and replaces an earlier one, only when all files are written.

    Raises:
        LRSAError: the disk is full, or the directory is not writable.
    """
    weights = _full_weights(engine)
    if not mesh.is_main:
        return
    assert weights is not None  # as on the first rank
    lm, lora = objective_of(engine).lm, config.model.lora
    raise_reach(lm.config, config.model.rope, config.seq_len)
    # The objective may hold other weights as well.
    weights = {n.removeprefix(WRAPPER_PREFIX): x for n, x in weights.items() if n.startswith(WRAPPER_PREFIX)}
    partial = final.with_name(f"{final.name}.partial")
    try:
        foreign = remove_files(partial, MODEL_FILES)
        as_adapters = bool(lora.rank) and lora.export == "adapter"
        base = base_name(config.model) if as_adapters else None
        quantized = quantized_as(config.model, lm.dtype)
        if quantized is not None and base is None:
            weights = dequantized(lm, weights)
        if as_adapters:
            if base is None:
                _save_model(lm, base_weights(weights), partial / BASE)
                base = str(final.resolve() / BASE)
                quantized = None  # its weights are those that the adapters were trained on
            save_adapters(lm, weights, lora, partial, base, config.model.revision, quantized)
        else:
            weights = merge_adapters(lm, weights, lora) if lora.rank else weights
            _save_model(lm, weights, partial)
        tokenizer.save_pretrained(partial)
        follow_umask(partial)
        replace_folder(partial, final, MODEL_FILES, foreign)
    except (OSError, SafetensorError) as error:
        remove_files(partial, MODEL_FILES)
        raise LRSAError(f"the model could not be written to {final}: {error}; the run is not complete.") from error


def _save_model(lm: PreTrainedModel, weights: dict[str, torch.Tensor], directory: Path) -> None:
    # A model with adapters in its layers would use their names: a bare model of the same class saves the weights.
    with torch.device("meta"):
        bare = type(lm)(lm.config)
    bare.generation_config = lm.generation_config
    bare.save_pretrained(directory, state_dict=weights)


def _full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """All weights, on the CPU of rank 0; a collective under ZeRO-3."""
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()
    return {name: tensor.detach().cpu() for name, tensor in objective_of(engine).state_dict().items()}


def mark(directory: Path, name: str) -> None:
    """Writes COMPLETED or STOPPED, the last action of a run: everything else is on disk by then."""
    (directory / name).write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")
