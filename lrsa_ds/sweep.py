"""The jobs of a sweep, each a separate run under the deepspeed launcher, and their results."""

import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from lrsa_ds.directories.layout import TRAIN, check_directory, mark_directory
from lrsa_ds.errors import LRSAError
from lrsa_ds.intervals import combined_interval, interval_of, median_interval
from lrsa_ds.labels import SMALLER, rows_of_smallest
from lrsa_ds.parallel.rendezvous import free_port
from lrsa_ds.process.exits import Exit
from lrsa_ds.train.output import COMPLETED

JOB, LOG = "job.json", "log.txt"
MAX_NAME = 100  # characters of a directory's name, without the digest; file systems take 255
GRACE_SECONDS = 40  # for a job to stop: longer than DeepSpeed's launcher waits for its ranks


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        directory: its output directory.
        swept: the swept keys and their values in this job, as typed.
        overrides: all arguments of `launch/train.py`.
    """

    directory: Path
    swept: dict[str, str]
    overrides: list[str]

    @property
    def name(self) -> str:
        return job_name(self.swept)


def job_name(swept: dict[str, str]) -> str:
    """Such as "retention=0.25,lr=1e-05": what a job is called in tables, pictures and W&B."""
    return ",".join(f"{key.split('.')[-1]}={value}" for key, value in swept.items()) or "job"


def job_directory(swept: dict[str, str]) -> str:
    """Such as "retention-0.25_lr-1e-05": a name that needs no quoting in shells and Hydra.

    If that drops characters, a digest of the values keeps the names of different jobs distinct.
    """
    plain = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in swept.items()) or "job"
    safe = re.sub(r"[^A-Za-z0-9_.+-]+", "-", plain).lstrip("-")[:MAX_NAME]
    return safe if safe == plain else f"{safe}_{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


class Runner:
    """Runs jobs, one at a time in each slot; every job is a process group that is stopped with the sweep.

    Args:
        root: the checkout, where `launch/train.py` is.
        launcher_args: for the deepspeed launcher.
        slots: for each job that may run at the same time, its GPUs, or None for all.
    """

    def __init__(self, root: Path, launcher_args: Sequence[str], slots: Sequence[Sequence[int] | None]):
        self.root = root
        self.launcher_args = list(launcher_args)
        self.slots = list(slots)
        self.running: dict[int, subprocess.Popen] = {}
        self.stopped = threading.Event()
        # Held while a job starts: the stop of all is to see every job. A signal may interrupt its own thread.
        self.lock = threading.RLock()

    def run(self, job: Job, slot: int = 0, number: str = "") -> bool:
        """Runs one job to its end, unless it is done already. Returns whether it is complete."""
        label = f"{number}{job.name}"
        try:
            check_directory(job.directory, TRAIN)
        except LRSAError as error:
            print(f"{label}: failed: {error}", flush=True)
            return False
        if (job.directory / COMPLETED).exists():
            is_same = json.loads((job.directory / JOB).read_text())["overrides"] == job.overrides
            other = f"failed: {job.directory} holds a finished run of other settings: choose another output_dir"
            print(f"{label}: {'done before' if is_same else other}", flush=True)
            return is_same
        job.directory.mkdir(parents=True, exist_ok=True)
        mark_directory(job.directory, TRAIN)
        (job.directory / JOB).write_text(json.dumps({"swept": job.swept, "overrides": job.overrides}, indent=1) + "\n")
        print(f"{label}: starts, log in {job.directory / LOG}", flush=True)
        started = time.monotonic()
        with open(job.directory / LOG, "a") as log:
            process = self._start(job, slot, log)
            process.wait()
            self.running.pop(process.pid, None)
        # The launcher's exit code is not always reliable; the mark is.
        is_complete = (job.directory / COMPLETED).exists()
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        said = "done" if is_complete else f"failed (exit code {process.returncode}): {_reason(job.directory / LOG)}"
        print(f"{label}: {said} after {minutes}:{seconds:02}", flush=True)
        return is_complete

    def run_all(self, jobs: Sequence[Job]) -> None:
        """Runs all jobs, one in each slot at a time; the others continue if one fails."""
        waiting = list(enumerate(jobs, start=1))
        lock = threading.Lock()

        def work(slot: int) -> None:
            while not self.stopped.is_set():
                with lock:
                    if not waiting:
                        return
                    number, job = waiting.pop(0)
                self.run(job, slot, f"[{number}/{len(jobs)}] ")

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(len(self.slots))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _start(self, job: Job, slot: int, log: IO) -> subprocess.Popen:
        with self.lock:
            if self.stopped.is_set():
                sys.exit(Exit.INTERRUPTED)
            process = subprocess.Popen(
                self._command(job, slot),
                env=os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running[process.pid] = process
        return process

    def _command(self, job: Job, slot: int) -> list[str]:
        gpus = self.slots[slot]
        where = [] if gpus is None else ["--include", f"localhost:{','.join(map(str, gpus))}"]
        launcher = ["deepspeed", *self.launcher_args, *where, "--master_port", str(free_port())]
        return [*launcher, str(self.root / "launch" / "train.py"), *job.overrides]

    def stop(self) -> None:
        """Stops the running jobs, and kills those that do not end; each can be resumed."""
        with self.lock:
            self.stopped.set()
            groups = list(self.running.values())
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in groups:
                if _is_alive(process.pid):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + GRACE_SECONDS
            while any(_is_alive(process.pid) for process in groups) and time.monotonic() < deadline:
                time.sleep(0.1)


def _is_alive(group: int) -> bool:
    """Whether a process group has members: its leader, the launcher, ends before the ranks do."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def _reason(log: Path) -> str:
    """The error message of a failed job, or the last line that it printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else lines[-1][:300] if lines else "it printed nothing"


def result(directory: Path) -> dict:
    """The result of the job in a directory: the swept keys, `status`, and the figures of a run that trained.

    `score` is the mean over tasks of exact match under the smallest cache and `tokens` that of token accuracy, in
    percent; `cache_factor` is the mean of how many times smaller that cache is; `loss` is that of the last step,
    `step_seconds` the median of all steps except the first. `score` and `step_seconds` have 95 % intervals, such as
    `score_low` to `score_high`; those of a median of fewer than six steps are NaN.
    """
    swept = json.loads((directory / JOB).read_text())["swept"]
    row = {"job": job_name(swept), "swept": swept, "directory": str(directory)}
    row["status"] = "done" if (directory / COMPLETED).exists() else "failed"
    metrics = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps = [r for r in rows if r["kind"] == "train"]
    after = [r for r in rows if r["kind"] == "eval" and r["when"] == "after"]
    if steps:
        row["loss"] = steps[-1]["loss"]
        seconds = [r["step_seconds"] for r in (steps[1:] or steps)]
        row["step_seconds"] = statistics.median(seconds)
        row["step_seconds_low"], row["step_seconds_high"] = median_interval(seconds)
        row["peak_memory_gb"] = max(r["peak_memory_gb"] for r in steps)
    if after:
        smallest = rows_of_smallest(after)
        factors = [r["cache_factor"] for r in smallest if "cache_factor" in r]  # jobs of an earlier version have none
        row["cache_factor"] = statistics.mean(factors) if factors else None
        scores, ends = [r["exact_match"] for r in smallest], [interval_of(r, "exact_match") for r in smallest]
        row["score"], row["score_low"], row["score_high"] = combined_interval(scores, ends, [1] * len(scores))
        row["tokens"] = statistics.mean(r["token_accuracy"] for r in smallest)
    return row


def results(root: Path) -> list[dict]:
    """All jobs of a sweep's directory, in the order of their values."""
    found = [result(path.parent) for path in root.glob(f"*/{JOB}")]
    return sorted(found, key=lambda row: [as_number(value) for value in row["swept"].values()])


def as_number(value: str) -> tuple:
    """Orders the values of a key: numbers by size, then words."""
    try:
        return (0, float(value), "")
    except ValueError:
        return (1, 0.0, value)


FIGURES = {"cache_factor": "smaller", "score": "exact %", "tokens": "tokens %", "loss": "loss"}
FIGURES |= {"step_seconds": "s/step", "peak_memory_gb": "GB"}
LEGEND = f"smaller: {SMALLER} of the smallest cache evaluated; exact %, tokens %: answers and their tokens under it"


def sweep_table(rows: list[dict]) -> str:
    """A line for each job: the swept keys, its figures, and its status; and a legend."""
    keys = list(dict.fromkeys(key for row in rows for key in row["swept"]))
    head = [*(key.split(".")[-1] for key in keys), *FIGURES.values(), "status"]
    lines = [head]
    for row in rows:
        figures = [f"{row[name]:.3g}" if row.get(name) is not None else "-" for name in FIGURES]
        lines.append([*(row["swept"].get(key, "-") for key in keys), *figures, row["status"]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*table, "", LEGEND])
