"""Scripts in processes that are forked from one which has imported the libraries: that saves each of them seconds.

Nothing of this project is imported there, so a script begins as it would by itself. Tests of the launcher, of signals
and of the environment start real processes instead (`tests/dist/launcher.py`).
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from unittest import mock

LIBRARIES = [
    "deepspeed.runtime.sequence_parallel.ulysses_sp",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "hydra.main",
    "datasets",
    "matplotlib.backends.backend_agg",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
]
GRACE_SECONDS = 60  # for the others to end by themselves when one has failed


@cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is imported
        multiprocessing.forkserver.ensure_running()
    return context


def _become(script: str, arguments: list[str], environment: dict[str, str], cwd: str, output: str) -> None:
    """What `python script arguments` does, in a session of its own."""
    os.setsid()
    sys.stdout.flush()
    for descriptor, path in enumerate((os.devnull, f"{output}.out", f"{output}.err")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    gc.freeze()  # no collection has to look at the libraries
    runpy.run_path(script, run_name="__main__")


class Forked:
    """A script that runs once with each of these arguments and environments, all at a time."""

    def __init__(self, script: str, ranks: list[tuple[list[str], dict[str, str]]], cwd: Path):
        self._commands = [[script, *arguments] for arguments, _ in ranks]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [str(Path(self._folder.name) / str(number)) for number in range(len(ranks))]
        self._processes = [
            _context().Process(target=_become, args=(script, *rank, str(cwd), output))
            for rank, output in zip(ranks, self._outputs)
        ]
        for process in self._processes:
            process.start()

    def _kill(self) -> None:
        """Ends them and those that they have started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # it may not have a session yet
        for process in self._processes:
            process.join()

    def has_ended(self) -> bool:
        return all(process.exitcode is not None for process in self._processes)

    def finish(self, timeout: float) -> list[subprocess.CompletedProcess]:
        """Waits for their end; one that fails, or the timeout in seconds, ends all: 0 kills them at once.

        The exit code of one that was ended is negative.
        """
        try:
            self._wait(timeout)
        finally:
            self._kill()
        done = [
            subprocess.CompletedProcess(command, process.exitcode, _text(f"{output}.out"), _text(f"{output}.err"))
            for command, process, output in zip(self._commands, self._processes, self._outputs)
        ]
        self._folder.cleanup()
        return done

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self.has_ended() and time.monotonic() < deadline:
            if any(process.exitcode for process in self._processes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.02)


def run_forked(
    script: str, ranks: list[tuple[list[str], dict[str, str]]], cwd: Path, timeout: float
) -> list[subprocess.CompletedProcess]:
    return Forked(script, ranks, cwd).finish(timeout)


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""
