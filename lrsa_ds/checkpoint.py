"""Checkpoints in the output directory: whole or not there, found again, and loaded at any number of ranks.

A checkpoint is written under a name that ends in `.partial` and renamed when every rank has written its part, so that a
kill at any moment leaves the earlier ones as they were. DeepSpeed writes the tensors; `trainer.json` says the rest.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from lrsa_ds.config import TrainConfig, require
from lrsa_ds.errors import LRSAError
from lrsa_ds.parallel.mesh import Mesh

TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "file write failed")
DIRECTORY = "checkpoints"
PARTIAL = ".partial"
TRAINER = "trainer.json"
# Names of DeepSpeed's own states below a checkpoint: as saved, and converted for another number of ranks.
SAVED, UNIVERSAL = "state", "universal"
# Settings that a run may change when it goes on: where and how it computes, not what.
MAY_CHANGE = (
    "run_name",
    "output_dir",
    "activation_checkpointing",
    "loss_chunk_size",
    "attention.backend",
    "data.num_workers",
    "parallel",
    "zero.offload_optimizer",
    "zero.offload_param",
    "zero.gather_layers",
    "zero.reduce_bucket_size",
    "zero.overlap_comm",
    "optim.micro_batch",
    "optim.grad_accum",
    "eval",
    "log",
    "checkpoint",
)


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint: what `trainer.json` holds, and where it lies.

    Args:
        step: optimizer steps that were done.
        position: where the stream of training sequences stands.
        world_size: the number of ranks that wrote it.
        settings, data: the configuration, and what the data looked like.
    """

    directory: Path
    step: int
    position: dict
    world_size: int
    settings: dict
    data: str


def find_checkpoint(output: Path) -> ResumePoint | None:
    """The newest whole checkpoint of a run, if there is any."""
    found = [path for path in (output / DIRECTORY).glob("step_*") if (path / TRAINER).is_file()]
    whole = [path for path in found if path.suffix != PARTIAL]
    if not whole:
        return None
    newest = max(whole, key=lambda path: int(path.name.removeprefix("step_")))
    return ResumePoint(directory=newest, **json.loads((newest / TRAINER).read_text(encoding="utf-8")))


def check_resume(point: ResumePoint, config: TrainConfig, data: str) -> None:
    """Raises LRSAError if `config` or the data are not those of the checkpoint; names what differs."""
    instead = "restore it, choose another output_dir, or set checkpoint.overwrite=true to start anew"
    there, here = _flat(point.settings), _flat(plain_settings(config))
    differing = [
        f"{key}={here.get(key)!r} (was {there.get(key)!r})"
        for key in sorted(there | here)
        if there.get(key) != here.get(key) and not any(f"{key}.".startswith(f"{may}.") for may in MAY_CHANGE)
    ]
    place = f"output_dir={point.directory.parent.parent} holds step {point.step} of a run"
    require(not differing, f"{place} with other settings, {', '.join(differing)}: {instead}.")
    require(data == point.data, f"{place} over other data (it was {point.data}, and is {data}): {instead}.")


def plain_settings(config: TrainConfig) -> dict:
    """The configuration as JSON would give it back."""
    return json.loads(json.dumps(asdict(config)))


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        is_group = isinstance(value, dict) and value and prefix == ""
        flat |= _flat(value, f"{key}.") if is_group else {prefix + key: value}
    return flat


def save_checkpoint(
    engine: DeepSpeedEngine, output: Path, trainer: dict, keep: int, num_bytes: int, mesh: Mesh
) -> Path:
    """Writes a checkpoint on all ranks and removes all but the newest `keep`; returns its directory.

    Args:
        trainer: the fields of a `ResumePoint` but its directory.
        num_bytes: what the checkpoint is expected to take.

    Raises:
        LRSAError: the disk is full, or the directory cannot be written; earlier checkpoints are whole.
    """
    final = output / DIRECTORY / f"step_{trainer['step']:06d}"
    partial = final.with_name(final.name + PARTIAL)
    problem = mesh.from_main(_make_room(partial, num_bytes) if mesh.is_main else None)
    require(problem is None, f"{problem}")
    try:
        engine.save_checkpoint(str(partial), tag=SAVED, save_latest=False)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its archive writer, in one of several places.
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        reason = str(error).splitlines()[0]
        raise LRSAError(f"the checkpoint {final} could not be written: {reason}; earlier ones are whole.") from error
    dist.barrier()
    if mesh.is_main:
        (partial / TRAINER).write_text(json.dumps(trainer, indent=1) + "\n", encoding="utf-8")
        if final.exists():  # the same step once more, after a stop at its end
            shutil.rmtree(final)
        os.replace(partial, final)
        _prune(output, keep)
    dist.barrier()
    return final


def _make_room(partial: Path, num_bytes: int) -> str | None:
    """Removes what a killed run left behind and makes the directory; returns what is wrong, if anything is."""
    try:
        remove_partial(partial.parent)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        return f"the checkpoint {partial.with_suffix('')} could not be written: {error.strerror}."
    if free >= num_bytes:
        return None
    partial.rmdir()
    return (
        f"the checkpoint {partial.with_suffix('')} needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
        "make room and start the same command again; earlier checkpoints are whole."
    )


def remove_partial(checkpoints: Path) -> None:
    for path in checkpoints.glob(f"*{PARTIAL}"):
        shutil.rmtree(path)


def _prune(output: Path, keep: int) -> None:
    whole = sorted(p for p in (output / DIRECTORY).glob("step_*") if p.suffix != PARTIAL)
    for path in whole[:-keep]:
        shutil.rmtree(path)


def load_checkpoint(engine: DeepSpeedEngine, point: ResumePoint, mesh: Mesh) -> None:
    """Restores weights, optimizer and scheduler. The engine must be made for `needs_conversion(point, mesh)`."""
    tag = UNIVERSAL if needs_conversion(point, mesh) else SAVED
    loaded, _ = engine.load_checkpoint(str(point.directory), tag=tag)
    require(loaded is not None, f"the checkpoint {point.directory} could not be loaded: set checkpoint.overwrite=true.")


def needs_conversion(point: ResumePoint, mesh: Mesh) -> bool:
    """Whether another number of ranks wrote the checkpoint, so that its parts have to be cut anew."""
    return point.world_size != mesh.world_size


def convert_checkpoint(point: ResumePoint, zero_stage: int, mesh: Mesh) -> None:
    """Lets rank 0 cut the checkpoint into DeepSpeed's universal form, once.

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
    shutil.rmtree(partial, ignore_errors=True)
    workers = str(max(1, min(8, os.cpu_count() or 1)))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(partial)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    if zero_stage < 3:
        command.append("--inject_missing_state")  # what Megatron's models would have saved, and has no meaning here
    # A process of its own, without the launcher's variables: the converter would take them for a run to join.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    os.replace(partial, final)
    (point.directory / "latest_universal").unlink(missing_ok=True)  # it names the partial one, and is not needed
    return None
