"""`console.log`: the terminal output of a run, also written to its directory."""

import os
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

from lrsa_ds.directories.layout import CONSOLE
from lrsa_ds.errors import LRSAError

# How the last words of a run begin (see `voice.py`): any rank may be the one that says them.
LAST_WORDS = ("error: ", "stopped ", "interrupted ")


class Tee:
    """A stream that also writes its whole lines to a file; of what is redrawn in place, as bars are, the last state.

    Args:
        number: the file's descriptor, opened for appending: several processes may write lines to it.
        only: write only lines that begin so.
    """

    def __init__(self, stream: TextIO, number: int, only: str | tuple[str, ...] = ""):
        self._stream, self._number, self._only = stream, number, only
        self._line = ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        redrawn = (self._line + text).replace("\x1b[K", "").split("\n")
        *lines, self._line = (line.rpartition("\r")[2] for line in redrawn)
        chosen = [line for line in lines if line.startswith(self._only)]
        if chosen:
            self._append("".join(f"{line}\n" for line in chosen))
        return written

    def _append(self, text: str) -> None:
        try:
            os.write(self._number, text.encode("utf-8", "replace"))
        except OSError:  # a full disk: the terminal has the line, and the run has its own sentence for that
            self._number = os.open(os.devnull, os.O_WRONLY)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def keep_console(directory: Path, is_main: bool) -> None:
    """From now on, to the end of this process, `console.log` in `directory` receives what this rank says.

    Of ranks other than the first it receives their last words alone. An earlier run's lines stay before it.

    Raises:
        LRSAError: the file cannot be opened.
    """
    try:
        number = os.open(directory / CONSOLE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise LRSAError(f"{directory / CONSOLE} cannot be opened: {error.strerror}.") from error
    if is_main:
        when = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.write(number, f"--- {when}, host {socket.gethostname()}, process {os.getpid()}\n".encode())
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream = stream._stream if isinstance(stream, Tee) else stream
        setattr(sys, name, Tee(stream, number, "" if is_main else LAST_WORDS))
