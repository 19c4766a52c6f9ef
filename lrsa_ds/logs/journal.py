"""A run's record on disk, and its progress on the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from lrsa_ds.errors import LRSAError, require

LINE_SECONDS = 10  # between two lines of progress where there is no terminal


class JSONLines:
    """A file of one valid JSON object per line. NaN and infinity, unknown to JSON, are null beside `"<name>_text"`.

    Raises:
        LRSAError: the file cannot be opened, or a line cannot be written, as when the disk is full.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise LRSAError(f"{path} cannot be opened: {error.strerror}.") from error

    def write(self, row: dict) -> None:
        """Appends one line; it is with the operating system, whatever happens to this process, once this returns."""
        line = (json.dumps(without_nan(row), allow_nan=False, default=str) + "\n").encode()
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise LRSAError(f"{self._path} cannot be written: {error.strerror}.") from error
        require(written == len(line), f"{self._path} cannot be written: only a part of a line fits on the disk.")

    def close(self) -> None:
        os.close(self._file)


def without_nan(value):
    """The value as JSON can hold it, see `JSONLines`."""
    if isinstance(value, dict):
        clean = {}
        for name, item in value.items():
            clean[name] = without_nan(item)
            if isinstance(item, float) and not math.isfinite(item):
                clean[f"{name}_text"] = str(float(item))
        return clean
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_above(text: str) -> None:
    """Prints to stdout without tearing a progress bar; what the terminal cannot encode is shown as "?"."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


class Progress:
    """On a terminal a bar; elsewhere a line for the first and the last step and every `LINE_SECONDS` between them.

    Args:
        unit: what is counted, in front of the numbers.
        leave: whether the bar stays on the terminal when it is closed.
        later: the seconds of a run after this, from those of a step and the number of steps done.
        expected: the seconds of a step, until steps are timed; None: not known. The first step is timed too, but has
            the warm-up, so it counts only if it takes less.
    """

    def __init__(
        self,
        num_steps: int,
        unit: str = "step",
        leave: bool = True,
        later: Callable[[float, int], float] | None = None,
        expected: float | None = None,
    ):
        self._num_steps = num_steps
        self.later, self.expected = later, expected
        self._unit = unit
        self._first = None  # step and time of the first row: later steps are timed against it, as it has the warm-up
        self._last_line = -math.inf
        self._bar = None
        if sys.stderr.isatty():
            # The bar comes last: it is what a narrow terminal may cut off.
            self._bar = tqdm(total=num_steps, dynamic_ncols=True, bar_format="{desc}  {bar:20}", leave=leave)
            self._bar.set_description_str("starting")

    def announce(self, what: str, seconds: float) -> None:
        """Shows what the run does before the first step, and about how long all of it will take."""
        text = f"{what}  about {tqdm.format_interval(seconds)} left of the run"
        if self._bar is not None:
            self._bar.set_description_str(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, row: dict) -> None:
        step, now = row["step"], time.monotonic()
        text = self._text(row, now)
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            if step == self._num_steps:
                self._bar.refresh()
        elif now - self._last_line >= LINE_SECONDS or step == self._num_steps:
            self._last_line = now
            print(text, file=sys.stderr, flush=True)

    def _text(self, row: dict, now: float) -> str:
        step = row["step"]
        self._first = self._first or (step, now)
        num_timed, seconds = step - self._first[0], now - self._first[1]
        first = [known for known in (row.get("step_seconds"), self.expected) if known is not None]
        per_step = seconds / num_timed if num_timed else min(first, default=None)
        if per_step is None:
            return f"{self._unit} {step}/{self._num_steps}"
        parts = [f"{self._unit} {step}/{self._num_steps}"]
        formats = {"loss": "loss {:.3f}", "lr": "lr {:.1e}", "tokens_per_second": "{:,.0f} tokens/s"}
        formats |= {"tflops_executed": "{:.1f} TFLOPS", "mfu": "{:.0%} MFU"}
        formats |= {"peak_memory_gb": "{:.1f} GB", "host_memory_gb": "host {:.1f} GB"}
        parts += [shape.format(row[name]) for name, shape in formats.items() if row.get(name) is not None]
        left = max(0, self._num_steps - step) * per_step
        later = self.later(per_step, step) if self.later and per_step else 0.0
        of_run = f", {tqdm.format_interval(left + later)} of the run" if later else ""
        return "  ".join([*parts, f"{tqdm.format_interval(left)} left{of_run}"])

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics file, without a torn last line; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the run was killed while it wrote
            break
    return rows


def keep_rows_until(path: Path, step: int, may_write: bool) -> list[dict]:
    """The rows of a metrics file that a run keeps when it resumes after `step`: those recorded up to there.

    The file is rewritten with these rows alone by the rank that `may_write`; a torn last line is dropped.
    """
    if not path.exists():
        return []
    remaining = [row for row in read_rows(path) if _step_of(row) <= step]
    if may_write:
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in remaining), encoding="utf-8")
        os.replace(partial, path)
    return remaining


def _step_of(row: dict) -> float:
    if row["kind"] in ("start", "train", "checkpoint"):
        return row["step"]
    when = row.get("when", "")
    return 0 if when == "before" else int(when.removeprefix("step ")) if when.startswith("step ") else math.inf
