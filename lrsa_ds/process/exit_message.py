"""The message with which a run ends: printed once on each host, by the first rank that has one.

A launcher ends all ranks when one ends. So a rank must not exit while another is about to print the reason, and two
ranks must not print the same message. The ranks of a host share a small file: a rank locks it, prints unless the file
names an exit code already, and writes its own exit code.
"""

import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from lrsa_ds.process.launcher import is_one_of_several

PREFIX = "lrsa-ds"
# Read when the process starts: its parent may be gone later.
_STARTED = psutil.Process().create_time()
_PARENT = os.getppid()


def report_exit(text: str, code: int) -> int:
    """Prints `text` to stderr, unless another rank of this run has printed a message on this host.

    Returns:
        The exit code that belongs to the printed message: `code`, or that of the other rank.
    """
    if not is_one_of_several():
        _print(text)
        return code
    try:
        with _shared_file() as file:
            earlier = _code_in(file)
            if earlier is not None:
                return earlier
            _print(text)
            file.seek(0)
            file.truncate()
            json.dump({"code": int(code), "time": time.time()}, file)
            return code
    except OSError:  # the shared file cannot be written: printing twice is better than not at all
        _print(text)
        return code


def reported_exit(seconds: float) -> int | None:
    """The exit code of a rank that has printed a message; waits up to `seconds`, and returns None without one."""
    deadline = time.monotonic() + seconds
    while is_one_of_several():
        with suppress(OSError), _shared_file() as file:
            code = _code_in(file)
            if code is not None:
                return code
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return None


def _print(text: str) -> None:
    with suppress(OSError, ValueError):  # stdout or stderr is closed
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        over_bar = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears a progress bar in this line
        print(f"{over_bar}{text}", file=sys.stderr, flush=True)


@contextmanager
def _shared_file() -> Iterator[IO[str]]:
    """The file of this run, locked; those of runs whose launcher is gone are removed."""
    folder, owner = Path(tempfile.gettempdir()), f"{PREFIX}-{os.getuid()}-"
    for path in folder.glob(f"{owner}*"):
        parent = path.name.removeprefix(owner).split("-")[0]
        if parent.isdecimal() and int(parent) != _PARENT and not psutil.pid_exists(int(parent)):
            with suppress(OSError):
                path.unlink()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    path = folder / f"{owner}{_PARENT}-{os.environ.get('MASTER_PORT', '0')}-{attempt}"
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _code_in(file: IO[str]) -> int | None:
    """The exit code in the file, or None. One from before this process started is of an earlier run of the parent."""
    try:
        note = json.loads(file.read() or "{}")
    except json.JSONDecodeError:
        return None
    return note["code"] if note.get("time", 0) >= _STARTED else None
