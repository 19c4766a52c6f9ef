"""The output directory: who may write there, the exported model, and the mark of a finished run."""

import shutil
import time
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lrsa_ds.adapters import BASE, base_name, base_weights, merge_adapters, save_adapters
from lrsa_ds.checkpoint import ResumePoint, find_checkpoint
from lrsa_ds.config import TrainConfig, require
from lrsa_ds.directory import follow_umask
from lrsa_ds.errors import LRSAError
from lrsa_ds.parallel.mesh import Mesh

COMPLETED = "COMPLETED"
MODEL_DIRECTORY = "model"
# What a run writes into its directory: all that is removed when a run there is started anew.
STOPPED = "STOPPED"
BEST_DIRECTORY = "best"
RUN_FILES = (
    COMPLETED,
    STOPPED,
    "config.yaml",
    "metrics.jsonl",
    "predictions.jsonl",
    "evaluation.txt",
    "evaluation.png",
    "wandb_run.txt",
    "trace.json",
    MODEL_DIRECTORY,
    BEST_DIRECTORY,
    "checkpoints",
    "ranks",
    "wandb",
)
WRAPPER_PREFIX = "lm."


def check_output(config: TrainConfig, num_parameters: int, bytes_per_parameter: int) -> ResumePoint | None:
    """Refuses a directory that holds another run, cannot be written, or has no room for the exported model.

    Returns:
        The checkpoint from which the run goes on, if the directory holds one.
    """
    if config.output_dir is None:
        return None
    directory = Path(config.output_dir).expanduser()
    point = None
    if not config.checkpoint.overwrite:
        require(
            not (directory / COMPLETED).exists(),
            f"output_dir={directory} holds a finished run: choose another, or set checkpoint.overwrite=true.",
        )
        point = find_checkpoint(directory)
        require(
            point is None or config.checkpoint.resume == "auto",
            f"output_dir={directory} holds checkpoints of an unfinished run: set checkpoint.resume=auto to go on, or "
            "checkpoint.overwrite=true to throw them away.",
        )
    check_room(directory, num_parameters * bytes_per_parameter if config.checkpoint.export else 0)
    return point


def check_room(directory: Path, needed: int) -> None:
    """Makes `directory` and raises LRSAError unless it can be written and has `needed` bytes free, and a margin."""
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


def open_output(config: TrainConfig, mesh: Mesh, going_on: bool) -> Path:
    """The directory of this run, the same on every rank and, unless it goes on, empty of an earlier run's files.

    Without `output_dir` it is `outputs/<run_name>/<time>`, and rank 0's clock decides.
    """
    default = Path("outputs") / config.run_name / time.strftime("%Y-%m-%d_%H-%M-%S")
    directory = Path(config.output_dir).expanduser() if config.output_dir else default
    if mesh.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (STOPPED, "ranks") if going_on else RUN_FILES:
            path = directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    # The others hear of the directory when it is clear: they begin to write into it at once.
    return Path(mesh.from_main(str(directory)))


def export_model(engine: DeepSpeedEngine, tokenizer, config: TrainConfig, final: Path, mesh: Mesh) -> None:
    """Writes the model in Hugging Face format, with its tokenizer and LRSA settings, to the directory `final`.

    It appears there, in the place of an earlier one, only when all files are written.

    Raises:
        LRSAError: the disk is full, or the directory cannot be written.
    """
    weights = _full_weights(engine)
    if not mesh.is_main:
        return
    lm, lora = engine.module.lm, config.model.lora
    weights = {name.removeprefix(WRAPPER_PREFIX): tensor for name, tensor in weights.items()}
    partial = final.with_name(f"{final.name}.partial")
    try:
        if lora.rank and lora.export == "adapter":
            base = base_name(config.model)
            if base is None:
                _save_model(lm, base_weights(weights), partial / BASE)
                base = str(final.resolve() / BASE)
            save_adapters(lm, weights, lora, partial, base, config.model.revision)
        else:
            weights = merge_adapters(lm, weights, lora) if lora.rank else weights
            _save_model(lm, weights, partial)
        tokenizer.save_pretrained(partial)
        follow_umask(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise LRSAError(f"the model could not be written to {final}: {error}; the run is not complete.") from error


def _save_model(lm: PreTrainedModel, weights: dict[str, torch.Tensor], directory: Path) -> None:
    # A model with adapters in its layers would save them under their names: a bare one of the same kind saves these.
    with torch.device("meta"):
        bare = type(lm)(lm.config)
    bare.generation_config = lm.generation_config
    bare.save_pretrained(directory, state_dict=weights)


def _full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """All weights on the CPU of rank 0; a collective under ZeRO-3."""
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()
    return {name: tensor.detach().cpu() for name, tensor in engine.module.state_dict().items()}


def mark(directory: Path, name: str) -> None:
    """The last thing that a run does, as COMPLETED or STOPPED: everything else is on disk by then."""
    (directory / name).write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")
