"""Stop requests: SIGTERM, SIGUSR1, Ctrl-C, the end of the launcher. A run stops after its step, or at once before any.

A launcher sends SIGTERM for two reasons: the job is to end (then a checkpoint is written first), or another rank of the
job has died (then no step will ever end, and this process has to go at once).
"""

import signal
import socket
import threading
import time
from contextlib import suppress

from lrsa_ds.process.exit_message import report_exit, reported_exit
from lrsa_ds.process.exits import Exit, end_at_once
from lrsa_ds.process.launcher import Launcher, named

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER_ENDED = "the end of its launcher"
# Ranks notice at different times. They agree by numbers: the largest that any of them knows, and 0 for no reason.
REASONS = (None, LAUNCHER_ENDED, *(number.name for number in SIGNALS))
POLL_SECONDS = 0.5
# A second Ctrl-C is one that comes later than this: torchrun passes on the first, which its ranks have had already.
AGAIN_SECONDS = 1.0
EXIT_MESSAGE_SECONDS = 2.0  # for a rank that is exiting to print why


class StopRequest:
    """Whether this process is asked to stop. Create it in the main thread, before anything that takes long.

    Until `begin` a stop request ends the process at once, since there is nothing to save. A separate thread receives
    the signals, since the main thread may wait in a collective for minutes.
    """

    def __init__(self):
        self.reason: str | None = None
        self._begun, self._accepted = threading.Event(), threading.Event()
        self._interrupted: float | None = None
        self._launcher = Launcher()
        self._heard, sender = socket.socketpair()
        self._heard.settimeout(POLL_SECONDS)
        sender.setblocking(False)
        self._sender = sender
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the thread acts; without a handler the process would end here
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    @property
    def is_set(self) -> bool:
        return self.reason is not None

    @property
    def number(self) -> float:
        """The place of the reason in `REASONS`, 0 without one: the maximum over the ranks is what they agree on."""
        return float(REASONS.index(self.reason))

    def begin(self) -> None:
        """From now on the run stops at the end of a step."""
        self._begun.set()

    def accept(self) -> None:
        """All ranks have agreed to stop, or are done: from now on a rank that has exited is no error."""
        self._accepted.set()

    def _listen(self) -> None:
        while True:
            with suppress(TimeoutError):
                for number in self._heard.recv(64):
                    self._note(number)
            if self.reason is None and self._launcher.is_gone():
                self.reason = LAUNCHER_ENDED
            if self.is_set and not self._accepted.is_set():
                self._act()

    def _note(self, number: int) -> None:
        if number not in SIGNALS:
            return
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupted = self._interrupted or now
            if now - self._interrupted > AGAIN_SECONDS:
                end_at_once(
                    report_exit("interrupted twice: ended at once; earlier checkpoints are complete.", Exit.INTERRUPTED)
                )

    def _act(self) -> None:
        missing = self._launcher.missing()
        if missing:
            code = reported_exit(EXIT_MESSAGE_SECONDS)
            end_at_once(report_exit(_lost(missing), Exit.LOST) if code is None else code)
        if not self._begun.is_set():
            sentence = f"stopped by {self.reason}: nothing is lost, the same command resumes or starts again."
            end_at_once(report_exit(sentence, Exit.STOPPED))


def _lost(ranks: list[int]) -> str:
    return (
        f"error: {named(ranks)} ended without a word, killed (for want of memory?) or crashed: all ranks end; the same "
        "command resumes from the last checkpoint."
    )
