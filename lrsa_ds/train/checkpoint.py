"""Checkpoints in the output directory: complete or absent, found again, and loaded with any number of ranks.

They are written by `saving.py`. A name that ends in `.partial` marks an incomplete one. DeepSpeed writes the tensors;
`trainer.json` holds everything else.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.stream import reread
from lrsa_ds.directories.layout import STEP_FILES, UNIVERSAL_FILES, remove_files
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.parallel.mesh import Mesh, world_size
from lrsa_ds.settings.model import ModelConfig

DIRECTORY = "checkpoints"
PARTIAL = ".partial"
TRAINER = "trainer.json"
# Subdirectories of a checkpoint with DeepSpeed's states: as saved, and converted for another number of ranks.
SAVED, UNIVERSAL = "state", "universal"
# Settings that a run may change when it resumes: where and how it computes, but not what it computes.
MAY_CHANGE = (
    "run_name",
    "output_dir",
    "activation_checkpointing",
    "loss_chunk_size",
    "attention.backend",
    "data.num_workers",
    "eval.allow_fewer",
    "data.on_bad_row",
    "data.report",
    "parallel",
    "zero.offload_optimizer",
    "zero.offload_param",
    "zero.gather_layers",
    "zero.reduce_bucket_size",
    "zero.overlap_comm",
    "optim.shorten_warmup",
    "optim.micro_batch",
    "optim.grad_accum",
    "eval",
    "log",
    "checkpoint",
)
# Settings that determine the data or how they are cut: checkpoint.accept_data_change=true allows changing them too.
DATA_SETTINGS = ("data", "seq_len")


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint: the content of `trainer.json`, and its directory.

    Args:
        step: number of completed optimizer steps.
        position: of the stream of training sequences.
        world_size: number of ranks that wrote it.
        settings, data: the configuration, and the fingerprint of the data.
        changed: a sentence, if the data have changed since and `position` was adapted to them.
    """

    directory: Path
    step: int
    position: dict
    world_size: int
    settings: dict
    data: str
    changed: str | None = None


def whole_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest last; other files beside them are ignored."""
    found = [path for path in (output / DIRECTORY).glob("step_*") if (path / TRAINER).is_file()]
    whole = [path for path in found if re.fullmatch(r"step_\d+", path.name)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))


def find_checkpoint(output: Path) -> ResumePoint | None:
    """The newest complete checkpoint of a run, if any.

    Raises:
        LRSAError: its `trainer.json` cannot be read.
    """
    whole = whole_checkpoints(output)
    if not whole:
        return None
    path = whole[-1] / TRAINER
    try:
        return ResumePoint(directory=whole[-1], **json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LRSAError(
            f"{path} is not from a checkpoint, or is damaged ({error}): choose another output_dir."
        ) from error


def check_resume(point: ResumePoint, config: TrainConfig, data: str) -> ResumePoint:
    """The point from which a run with `config` over `data` resumes.

    Raises:
        LRSAError: they differ from those of the checkpoint; the message names the differences. Changes of the data and
            their settings are allowed by `checkpoint.accept_data_change`.
    """
    differing = differing_settings(point.settings, config)
    of_data = [key for key in differing if _is_below(key, DATA_SETTINGS)]
    accept = config.checkpoint.accept_data_change
    place = f"output_dir={point.directory.parent.parent} holds step {point.step} of a run"
    instead = "restore it, choose another output_dir, or set checkpoint.overwrite=true to start again"
    if len(of_data) == len(differing) and not accept:
        instead = f"{instead}; checkpoint.accept_data_change=true resumes with the data as they are now"
    refused = [said for key, said in differing.items() if not (accept and key in of_data)]
    require(not refused, f"{place} with other settings, {', '.join(refused)}: {instead}.")
    require(
        config.optim.name != "adamw_8bit" or point.world_size == world_size(),
        f"{place} with optim.name=adamw_8bit that {point.world_size} ranks wrote, and 8-bit states cannot be resharded "
        f"for {world_size()}: start as many ranks, or set checkpoint.overwrite=true to start again.",
    )
    if data == point.data and not of_data:
        return point
    changes = ", ".join([*differing.values(), *([f"it was {point.data}, and is {data}"] if data != point.data else [])])
    require(accept, f"{place} over other data ({changes}): {instead}.")
    changed = (
        f"the data have changed ({changes}), and checkpoint.accept_data_change=true: the run resumes at the same place "
        "in the order of the present rows, and reads again those that were being packed. If the number of rows has "
        "changed, so has their order, and in this epoch some rows may be read twice and others not at all."
    )
    return replace(point, position=reread(point.position), changed=changed)


def differing_settings(settings: dict, config: TrainConfig) -> dict[str, str]:
    """A sentence for each setting that has changed but may not change when a run resumes; by key."""
    # A key that did not exist in the release that wrote the checkpoint has its default value.
    defaults = plain_settings(TrainConfig(model=ModelConfig(name="")))
    there, here = _flat(defaults) | _flat(settings), _flat(plain_settings(config))
    return {
        key: f"{key}={here.get(key)!r} (was {there.get(key)!r})"
        for key in sorted(there | here)
        if there.get(key) != here.get(key) and not _is_below(key, MAY_CHANGE)
    }


def _is_below(key: str, groups: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def plain_settings(config: TrainConfig) -> dict:
    """The configuration after a round trip through JSON."""
    return json.loads(json.dumps(asdict(config)))


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        is_group = isinstance(value, dict) and value and prefix == ""
        flat |= _flat(value, f"{key}.") if is_group else {prefix + key: value}
    return flat


def remove_partial(checkpoints: Path) -> None:
    """Removes incomplete checkpoints."""
    for path in checkpoints.glob(f"*{PARTIAL}"):
        if re.fullmatch(r"step_\d+", path.stem):
            remove_files(path, STEP_FILES)


def load_checkpoint(engine: DeepSpeedEngine, point: ResumePoint, mesh: Mesh, trained_only: bool = False) -> None:
    """Restores weights, optimizer and scheduler. The engine must be built for `needs_conversion(point, mesh)`.

    Args:
        trained_only: whether the checkpoint has trained parameters only; the others keep their values.
    """
    tag = UNIVERSAL if needs_conversion(point, mesh) else SAVED
    loaded, _ = engine.load_checkpoint(str(point.directory), tag=tag, load_module_strict=not trained_only)
    require(loaded is not None, f"the checkpoint {point.directory} could not be loaded: set checkpoint.overwrite=true.")


def needs_conversion(point: ResumePoint, mesh: Mesh) -> bool:
    """Whether another number of ranks wrote the checkpoint, so that its parts have to be resharded."""
    return point.world_size != mesh.world_size


def convert_checkpoint(point: ResumePoint, zero_stage: int, mesh: Mesh) -> None:
    """Converts the checkpoint to DeepSpeed's universal form, once, on rank 0.

    Raises:
        LRSAError: DeepSpeed's converter failed.
    """
    problem = mesh.from_main(_convert(point, zero_stage) if mesh.is_main else None)
    require(
        problem is None,
        f"the checkpoint {point.directory} could not be converted to another number of ranks: {problem}",
    )


def _convert(point: ResumePoint, zero_stage: int) -> str | None:
    source, final = point.directory / SAVED, point.directory / UNIVERSAL
    if final.exists():
        return None
    partial = final.with_name(UNIVERSAL + PARTIAL)
    remove_files(partial, UNIVERSAL_FILES)
    workers = str(max(1, min(8, os.cpu_count() or 1)))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(partial)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    if zero_stage < 3:
        command.append("--inject_missing_state")  # state of Megatron's models, not used here
    # A separate process without the launcher's variables: the converter would try to join a distributed run.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    os.replace(partial, final)
    (point.directory / "latest_universal").unlink(missing_ok=True)  # it names the partial directory, and is not needed
    return None
