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


def run_forked(
    script: str, ranks: list[tuple[list[str], dict[str, str]]], cwd: Path, timeout: float
) -> list[subprocess.CompletedProcess]:
    """Runs a script once with each of these arguments and environments, all at a time.

    One that fails, or the timeout in seconds, ends all. The exit code of one that was ended is negative.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder) / str(number)) for number in range(len(ranks))]
        processes = [
            _context().Process(target=_become, args=(script, *rank, str(cwd), output))
            for rank, output in zip(ranks, outputs)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, timeout)
        finally:
            for process in processes:
                _kill(process)
        texts = [[_text(f"{output}.{stream}") for stream in ("out", "err")] for output in outputs]
    return [
        subprocess.CompletedProcess([script, *arguments], process.exitcode, *text)
        for (arguments, _), process, text in zip(ranks, processes, texts)
    ]


def _wait(processes, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (codes := [process.exitcode for process in processes]).count(None) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)


def _kill(process) -> None:
    """Ends a process and those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have a session yet
    process.join()


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""
