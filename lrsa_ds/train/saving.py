"""Writing of checkpoints: complete or absent, and in the background if the host has memory for a copy.

DeepSpeed determines the content of each file. A checkpoint is written under a name that ends in `.partial`, and renamed
when every rank has written its part, so a kill at any moment leaves earlier checkpoints intact.
"""

import copy
import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from lrsa_ds.directories.layout import STEP_FILES, remove_files, replace_folder
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.logits import output_layer
from lrsa_ds.objectives import objective_of
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.process.launcher import ranks_of_host
from lrsa_ds.train.checkpoint import DIRECTORY, PARTIAL, SAVED, TRAINER, remove_partial, whole_checkpoints

# Parts of the error that torch's archive writer raises, a RuntimeError, if the disk is full.
TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "file write failed")
# Free host memory needed for a copy, as a multiple of its size: pinned memory is allocated in powers of two.
ROOM_FOR_COPY = 3


@dataclass
class _Writing:
    """A checkpoint that is being written."""

    trainer: dict
    partial: Path
    started: float
    foreign: list[Path]  # files in `partial` that are not ours
    waited: float = 0.0  # seconds for which training was blocked
    thread: threading.Thread | None = None
    error: Exception | None = None

    @property
    def final(self) -> Path:
        return self.partial.with_suffix("")


@dataclass(frozen=True)
class Written:
    """A complete checkpoint, the seconds for which training was blocked, and those until it was complete."""

    step: int
    path: Path
    waited: float
    took: float


def bytes_of_trained(engine: DeepSpeedEngine) -> int:
    """Upper bound for a checkpoint of the trained parameters alone: beside each three numbers in fp32.

    An output layer that is tied to frozen embeddings is in it too, under its own name.
    """
    model = objective_of(engine).lm
    trained = [p for p in model.parameters() if p.requires_grad]
    head = [p for p in output_layer(model).parameters() if not p.requires_grad]
    return sum(_count(p) * (p.element_size() + 12) for p in trained) + sum(_count(p) * p.element_size() for p in head)


def _count(parameter: torch.nn.Parameter) -> int:
    """Numbers of a complete parameter, of which a rank holds a shard under ZeRO-3."""
    return getattr(parameter, "ds_numel", parameter.numel())


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time. Every method is called by all ranks together.

    Args:
        keep: number of checkpoints to keep, the newest ones.
        num_bytes: upper bound for a checkpoint, over all ranks; None for one of the trained parameters alone, see
            `load_checkpoint`.
        write: "background", "wait", or "auto": in the background on GPUs if the host has memory for a copy.
    """

    def __init__(self, engine: DeepSpeedEngine, output: Path, keep: int, num_bytes: int | None, write: str, mesh: Mesh):
        self.engine, self.output, self.keep, self.mesh = engine, output, keep, mesh
        self.trained_only = num_bytes is None
        self.num_bytes = bytes_of_trained(engine) if num_bytes is None else num_bytes
        self.write = write
        self._files = _Files(engine)
        self._writing: _Writing | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing."""
        thread = self._writing.thread if self._writing else None
        return thread is not None and thread.is_alive()

    @property
    def is_background(self) -> bool:
        """Whether training continues while the newest checkpoint is written."""
        return self._files.copy_to_host

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was started that `finish` has not completed."""
        return self._writing is not None

    def start(self, trainer: dict) -> None:
        """Starts a checkpoint of the present state; `trainer` has the fields of `ResumePoint`, except its directory.

        Raises:
            LRSAError: there is not enough room, or the directory is not writable; earlier checkpoints are complete.
        """
        started = time.perf_counter()
        partial = self.output / DIRECTORY / f"step_{trainer['step']:06d}{PARTIAL}"
        foreign = self.mesh.on_main(lambda: _make_room(partial, self.num_bytes))
        writing = self._writing = _Writing(trainer, partial, started, foreign)
        self._files.copy_to_host = self._in_background()
        try:
            options = dict(save_latest=False, exclude_frozen_parameters=self.trained_only)
            self.engine.save_checkpoint(str(partial), tag=SAVED, **options)
        except (OSError, RuntimeError) as error:
            writing.error = error
        if self._files.copied:
            writing.thread = threading.Thread(target=self._write, args=(writing, self._files.take()), daemon=True)
            writing.thread.start()
        writing.waited = time.perf_counter() - started

    def _in_background(self) -> bool:
        if self.write != "auto":
            return self.write == "background"
        share = self.num_bytes * ranks_of_host(otherwise=self.mesh.world_size) / self.mesh.world_size
        lacks_room = self.mesh.device.type == "cpu" or psutil.virtual_memory().available < ROOM_FOR_COPY * share
        return self.mesh.max([float(lacks_room)])[0] == 0

    def _write(self, writing: _Writing, files: list[tuple[Any, str]]) -> None:
        try:
            while files:  # each copy is freed as soon as it is written
                state, path = files.pop(0)
                self._files.write(state, path)
        except (OSError, RuntimeError) as error:
            writing.error = error

    def finish(self) -> Written:
        """Waits for the checkpoint that is being written, and completes it.

        Raises:
            LRSAError: a rank could not write its part, for example on a full disk; earlier checkpoints are complete.
        """
        writing, begun = self._writing, time.perf_counter()
        assert writing is not None, "no checkpoint has been started"
        if writing.thread is not None:
            writing.thread.join()
        self._writing = None
        self._raise_together(writing)
        if self.mesh.is_main:
            text = json.dumps(writing.trainer, indent=1) + "\n"
            (writing.partial / TRAINER).write_text(text, encoding="utf-8")
            # There may be a checkpoint of the same step, after a stop at its end.
            replace_folder(writing.partial, writing.final, STEP_FILES, writing.foreign)
            _prune(self.output, self.keep)
        dist.barrier()
        now = time.perf_counter()
        return Written(writing.trainer["step"], writing.final, writing.waited + now - begun, now - writing.started)

    def _raise_together(self, writing: _Writing) -> None:
        """Raises on every rank what failed on any; an error that does not come from the disk is raised unchanged."""
        error = writing.error
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise error
        reasons: list[str | None] = [None] * self.mesh.world_size
        dist.all_gather_object(reasons, str(error).splitlines()[0] if error else None)
        for reason in filter(None, reasons):
            text = f"the checkpoint {writing.final} could not be written: {reason}; earlier ones are complete."
            raise LRSAError(text)


class _Files(TorchCheckpointEngine):
    """DeepSpeed's file writer, which can also copy the data to host memory, to be written later."""

    def __init__(self, engine: DeepSpeedEngine):
        super().__init__(engine._config)
        self.copy_to_host = False
        self.copied: list[tuple[Any, str]] = []
        engine.checkpoint_engine = self

    def save(self, state_dict: Any, path: str) -> None:
        """DeepSpeed calls this for each file."""
        if not self.copy_to_host:
            return self.write(state_dict, path)
        self.copied.append((on_host(state_dict), path))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, state_dict: Any, path: str) -> None:
        super().save(state_dict, path)

    def take(self) -> list[tuple[Any, str]]:
        files, self.copied = self.copied, []
        return files


def on_host(state: Any) -> Any:
    """A copy of nested dicts, lists and tensors, independent of the originals; copies from a GPU may be pending."""
    if isinstance(state, torch.Tensor):
        if not state.is_cuda:
            return state.detach().clone()
        host = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
        return host.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        copied = copy.copy(state)
        copied.update({key: on_host(value) for key, value in state.items()})
        return copied
    if type(state) in (list, tuple):
        return type(state)(map(on_host, state))
    return copy.deepcopy(state)


def _make_room(partial: Path, num_bytes: int) -> list[Path]:
    """Removes what a killed run left, and creates the directory; returns the files in it that are not ours.

    Raises:
        LRSAError: there is not enough room.
    """
    try:
        remove_partial(partial.parent)
        foreign = remove_files(partial, STEP_FILES)
        partial.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise LRSAError(f"the checkpoint {partial.with_suffix('')} could not be written: {error.strerror}.") from error
    if free < num_bytes:
        remove_files(partial, STEP_FILES)
        raise LRSAError(
            f"the checkpoint {partial.with_suffix('')} needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
            "free: make room and start the same command again; earlier checkpoints are complete."
        )
    return foreign


def _prune(output: Path, keep: int) -> None:
    for path in whole_checkpoints(output)[:-keep]:
        remove_files(path, STEP_FILES)
