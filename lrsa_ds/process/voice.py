"""One sentence for the whole run: the first rank of a host that has one says it, the others wait for that.

A launcher ends all ranks when one ends. So a rank must not leave while another is about to say why, and two must not
say the same. They share a small file: whoever holds its lock may speak, and writes down that it has.
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


def say_for_all(text: str, code: int) -> int:
    """Prints `text` to stderr, unless another rank of this run has said something on this host.

    Returns:
        The exit code that goes with what was said: `code`, or that of the rank that has spoken.
    """
    if not is_one_of_several():
        _say(text)
        return code
    try:
        with _shared_file() as file:
            earlier = _code_in(file)
            if earlier is not None:
                return earlier
            _say(text)
            file.seek(0)
            file.truncate()
            json.dump({"code": int(code), "time": time.time()}, file)
            return code
    except OSError:  # no place for the file: better twice than not at all
        _say(text)
        return code


def heard(seconds: float) -> int | None:
    """The exit code that goes with what another rank has said, waiting for it so long; None if none has spoken."""
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


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        over_bar = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand in this line
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
    """What was noted since this process started; a note from before is of an earlier run under the same parent."""
    try:
        note = json.loads(file.read() or "{}")
    except json.JSONDecodeError:
        return None
    return note["code"] if note.get("time", 0) >= _STARTED else None
