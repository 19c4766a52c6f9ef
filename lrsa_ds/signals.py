"""SIGTERM and SIGUSR1 as a wish to stop at the end of the step, and what to do if that end cannot come.

A launcher sends SIGTERM for two reasons: the job is to end (then a checkpoint is written first), or another rank of the
job has died (then no step will ever end, and this process has to go at once).
"""

import os
import signal
import socket
import threading

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.5
EXIT_CODE = 143  # of a process that SIGTERM has ended
NOTHING_LOST = 75  # of one that may be started again as it is


class StopRequest:
    """Knows whether a signal has asked this process to stop. Make one in the main thread, before anything long.

    Until `begin` a signal ends the process at once: there is nothing yet to save. A thread of its own hears the
    signals, since the main one may be deep in a collective for minutes.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._begun, self._accepted = threading.Event(), threading.Event()
        self._heard, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender = sender
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the thread acts; without a handler the process would end here
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def begin(self) -> None:
        """From now on a signal is a wish that the end of a step fulfils."""
        self._begun.set()

    def accept(self) -> None:
        """All ranks have agreed to stop: from now on they may end one after the other."""
        self._accepted.set()

    def _listen(self) -> None:
        while True:
            for number in self._heard.recv(64):
                if number in SIGNALS:
                    self.signal_name = signal.Signals(number).name
            if self.is_set and not self._begun.is_set():
                os._exit(NOTHING_LOST)
            while self.is_set and not self._accepted.wait(POLL_SECONDS):
                if _a_neighbour_died():
                    os._exit(EXIT_CODE)
            if self.is_set:
                return


def _a_neighbour_died() -> bool:
    """Whether the launcher on this host runs fewer processes than it has started."""
    expected = int(os.environ.get("LOCAL_SIZE", 1))
    if expected == 1:
        return False
    try:
        neighbours = psutil.Process(os.getppid()).children()
        return sum(n.status() != psutil.STATUS_ZOMBIE for n in neighbours) < expected
    except psutil.NoSuchProcess:  # the launcher itself is gone
        return True
