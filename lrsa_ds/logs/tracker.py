"""What a run sends to a service that follows it, and the thread that sends it.

The interface of W&B, TensorBoard and MLflow. `metrics.jsonl` is the record, so nothing that happens to a service may
stop or slow the training.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrsa_ds.hub import first_line

CLOSE_SECONDS = 30  # for all that a service still does when the run ends


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something to show.

    Args:
        values: numbers, by a name with slashes.
        step: the optimizer step that they belong to; None for none.
        tables: rows by the name of a table, all that were found so far.
        pictures: PNG files by name.
        summary: what holds of the run as a whole.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None
    tables: Mapping[str, list[dict]] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Under which name a run is known, and with which settings it runs."""

    project: str
    name: str
    group: str | None
    tags: list[str]
    config: dict


class Tracker(threading.Thread, ABC):
    """Owns the run of one service. Entries wait in a queue; the run continues if the service fails.

    Args:
        say: prints a sentence.
    """

    service = ""

    def __init__(self, output_dir: Path, identity: Identity, say: Callable[[str], None]):
        super().__init__(name=self.service, daemon=True)  # daemon: it must not keep a failed process alive
        self.output_dir, self.identity, self.say = output_dir, identity, say
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self.failed = False

    def send(self, entry: Entry) -> None:
        if self.is_alive():
            self._queue.put(entry)

    def close(self, failed: bool) -> None:
        """Ends the record within `CLOSE_SECONDS`; `failed` marks the run as such."""
        self.failed = failed
        self._queue.put(None)
        self.join(CLOSE_SECONDS)
        if self.is_alive():
            self.say(
                f"{self.service} did not end within {CLOSE_SECONDS} s and was left behind; metrics.jsonl is complete."
            )
            self.left_behind()

    def run(self) -> None:
        try:
            self.begin()
            while (entry := self._queue.get()) is not None:
                self.write(entry)
            self.finish()
        except Exception as error:  # whatever happens to the service, training continues
            self.say(
                f"{self.service} is off for the rest of this run ({first_line(error)}); metrics.jsonl is still written."
            )
            with suppress(Exception):
                self.give_up()
        finally:
            # SystemExit is how the background process of W&B reports.
            with suppress(Exception, SystemExit):
                self.clean_up()

    @abstractmethod
    def begin(self) -> None:
        """Opens the run, or opens that of a run that resumes again."""

    @abstractmethod
    def write(self, entry: Entry) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Ends the run after its last entry."""

    def give_up(self) -> None:
        """After an error: ends the run as one that has failed, if there is one."""

    def clean_up(self) -> None:
        """Always the last."""

    def left_behind(self) -> None:
        """The process is about to end, and this thread has not."""
