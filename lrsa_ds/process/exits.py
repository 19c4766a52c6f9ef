"""How every command ends, in one place."""

import multiprocessing
import os
import signal
from enum import IntEnum
from typing import NoReturn


class Exit(IntEnum):
    """Exit codes of a rank, and of a command without a launcher; through a launcher: docs/resume.md."""

    DONE = 0
    FAILED = 1  # a self-test or a job of a sweep that failed, or an error in this program (a traceback)
    REFUSED = 2  # something the user can mend, said in one sentence
    HUNG = 3  # nothing moved for parallel.timeout seconds, or so long that another run has taken the directory
    LOST = 4  # another rank of the run ended without a word
    STOPPED = 75  # by a signal, nothing is lost: "try again", in the words of sysexits.h
    INTERRUPTED = 130  # a second Ctrl-C, which does not wait for a checkpoint


def end_at_once(code: int) -> NoReturn:
    """Ends this process, and the one that prepares its data, without the interpreter's last steps."""
    kill_children()
    os._exit(code)


def kill_children() -> None:
    """Ends the process that prepares data. It ignores the signals that stop a run, so that asking it has no effect."""
    for child in multiprocessing.active_children():
        child.kill()


def ignore_ended_children() -> None:
    """torch's handler, in the main thread, takes the end of a process that prepares data for an error."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
