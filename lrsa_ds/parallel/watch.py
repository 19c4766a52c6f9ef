"""Detects a hang: without progress for too long, one rank reports which rank blocks the others, and all exit.

Every rank writes its current activity to a file of its own in the output directory, and a thread refreshes the file. So
a process that is stopped or gone can be told from one that is alive and waits for others.
"""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.process.exit_message import report_exit, reported_exit
from lrsa_ds.process.exits import Exit, end_at_once
from lrsa_ds.process.launcher import named

DIRECTORY = "ranks"
EXIT_MESSAGE_SECONDS = 5.0  # for the reporting rank to print its message


class Watch:
    """Ends this process when it has not moved for `timeout` seconds.

    Args:
        output: the output directory, the same for all ranks.
        timeout: seconds; 0 switches the watch off.
    """

    def __init__(self, output: Path, mesh: Mesh, timeout: float):
        self._directory, self._rank, self._world_size = output / DIRECTORY, mesh.rank, mesh.world_size
        self._timeout = timeout
        self._interval = max(0.2, min(10.0, timeout / 8))
        self._doing, self._since, self._beats = "starting", time.monotonic(), 0
        self._ended = threading.Event()
        if timeout > 0:
            self._directory.mkdir(exist_ok=True)
            self._write()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def doing(self, what: str) -> None:
        """Notes what this rank begins, such as "step 7: reading data"."""
        self._doing, self._since = what, time.monotonic()

    def close(self) -> None:
        self._ended.set()
        if self._timeout > 0:
            self._thread.join()
            self._file(self._rank).unlink(missing_ok=True)
            # The last rank to leave takes the folder along; for the others it is not empty yet, or gone already.
            with suppress(OSError):
                self._directory.rmdir()

    def _file(self, rank: int) -> Path:
        return self._directory / str(rank)

    def _write(self) -> None:
        self._beats += 1
        partial = self._file(self._rank).with_suffix(".partial")
        partial.write_text(json.dumps({"doing": self._doing, "beat": self._beats}))
        os.replace(partial, self._file(self._rank))

    def _read(self) -> list[dict | None]:
        found = []
        for rank in range(self._world_size):
            try:
                found.append(json.loads(self._file(rank).read_text()))
            except (OSError, json.JSONDecodeError):
                found.append(None)
        return found

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._write()
            if time.monotonic() - self._since > self._timeout:
                before = self._read()
                if self._ended.wait(3 * self._interval):
                    return
                self._write()
                if time.monotonic() - self._since > self._timeout:
                    self._end(before, self._read())

    def _end(self, before: list[dict | None], now: list[dict | None]) -> None:
        alive = {r: state for r, state in enumerate(now) if state is not None and state != before[r]}
        silent = [r for r in range(self._world_size) if r not in alive]
        if self._rank == min(alive, default=self._rank):
            report_exit(f"error: {self._sentence(silent, alive)}", Exit.HUNG)
        else:
            # The launcher ends all ranks when one ends: the reporting rank exits first.
            reported_exit(EXIT_MESSAGE_SECONDS)
        end_at_once(Exit.HUNG)

    def _sentence(self, silent: list[int], alive: dict[int, dict]) -> str:
        start = f"nothing has moved for {self._timeout:g} s (parallel.timeout) in {self._doing}: "
        if silent:
            verb = "gives" if len(silent) == 1 else "give"
            return f"{start}{named(silent)} {verb} no sign of life. All ranks end; the same command resumes."
        by_deed: dict[str, list[int]] = {}
        for rank, state in alive.items():
            by_deed.setdefault(state["doing"], []).append(rank)
        if len(by_deed) == 1:
            return f"{start}all ranks are there and wait for each other. All ranks end; the same command resumes."
        fewest = min(by_deed, key=lambda deed: len(by_deed[deed]))
        held_up = named(by_deed[fewest])
        return f"{start}{held_up} is still at '{fewest}' while others wait. All ranks end; the same command resumes."
