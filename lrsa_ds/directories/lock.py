"""One run in a directory at a time: a lock file that names its holder and can tell a dead one from one that lives.

Creating a file that must not exist yet is one step on every file system, shared ones included; locks of the kernel are
not to be relied upon there. The file lists the processes of the run. On the machine where they run their start times
tell whether they live. From elsewhere the file itself does: its holder renews it every few seconds, and the times of
two looks are compared with each other, since the clocks of two hosts may differ.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lrsa_ds.errors import LRSAError
from lrsa_ds.process.exit_message import report_exit
from lrsa_ds.process.exits import Exit, end_at_once

LOCK = "run.lock"
BEAT_SECONDS = 10.0
# After so long without a beat a holder elsewhere counts as dead: longer than a file server caches times.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Process:
    """A process, such that another one with the same number is not taken for it.

    Args:
        machine: the boot of a kernel and a namespace of process numbers; `host` may be shared by containers.
        started: clock ticks between that boot and the start of the process.
    """

    host: str
    machine: str
    pid: int
    started: int

    @property
    def is_here(self) -> bool:
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether it runs, for a process of this machine."""
        return _start_of(self.pid) == self.started


def this_process() -> Process:
    started = _start_of(os.getpid())
    assert started is not None  # this process runs
    return Process(socket.gethostname(), _machine(), os.getpid(), started)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> int | None:
    """When a process of this machine started; None if there is none, or only its exit code is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


@dataclass(frozen=True)
class Held:
    """What a lock file says: a token of its own, when it was taken, and the processes of the run, holder first."""

    token: str
    since: str
    processes: list[Process] = field(default_factory=list)

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


class RunLock:
    """The lock of a directory, held by one process in the name of all processes of its run.

    Args:
        beat: seconds between two renewals.
        patience: seconds without one after which a holder on another machine counts as dead.
    """

    def __init__(self, directory: Path, beat: float = BEAT_SECONDS, patience: float = PATIENCE_SECONDS):
        self._path, self._beat, self._patience = directory / LOCK, beat, patience
        self._own: Held | None = None
        self._released = threading.Event()

    def acquire(self, processes: list[Process]) -> None:
        """Takes the lock in the name of `processes`, whose first is this one, and keeps it until `release`.

        Raises:
            LRSAError: a run that lives holds it, or the directory cannot be written.
        """
        own = Held(uuid.uuid4().hex[:12], time.strftime("%Y-%m-%d %H:%M:%S %z"), processes)
        try:
            self._take(self._path, own)
        except OSError as error:
            raise LRSAError(f"output_dir={self._path.parent} cannot be locked: {error.strerror}.") from error
        self._own = own
        for left in self._path.parent.glob(f"{LOCK}.*"):  # by processes that died while they took the lock
            left.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._renew, args=(own,), name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back; without one it does nothing."""
        own, self._own = self._own, None
        if own is None:
            return
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # the directory is gone, or its server: the lock then counts as that of a dead process
            if self._is_own(own):
                self._path.unlink()

    def _take(self, path: Path, own: Held) -> None:
        while not _create(path, own):
            held = _read(path)
            if held is None:  # given back since
                continue
            living = _living(path, held, self._patience)
            if living is not None:
                raise LRSAError(_in_use(self._path.parent, living, held))
            # Of all that have found the same dead holder one may take its place: the one with the lock of its token.
            guard = path.with_name(f"{path.name}.{held.token}")
            self._take(guard, own)
            try:
                if _read(path) == held:
                    _replace(path, own)
                    return
            finally:
                guard.unlink(missing_ok=True)

    def _is_own(self, own: Held) -> bool:
        held = _read(self._path)
        return held is not None and held.token == own.token

    def _renew(self, own: Held) -> None:
        while not self._released.wait(self._beat):
            with suppress(OSError):  # a server that is away for a moment; the next beat looks again
                if self._is_own(own):
                    os.utime(self._path)
                elif not _create(self._path, own):  # it was removed by hand, or else another run has it
                    self._end()

    def _end(self) -> None:
        reason = f"another run has taken {self._path}, since this one gave no sign of life for {self._patience:g} s"
        end_at_once(report_exit(f"error: {reason}: it ends here.", Exit.HUNG))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes a directory if there is none, and holds its lock in the name of this process alone.

    Raises:
        LRSAError: as `RunLock.acquire`.
    """
    lock = RunLock(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LRSAError(f"output_dir={directory} cannot be written: {error.strerror}.") from error
    lock.acquire([this_process()])
    try:
        yield
    finally:
        lock.release()


def check_lock(directory: Path) -> None:
    """Raises LRSAError if a run that lives on this machine holds the lock of `directory`. Takes and changes nothing."""
    held = _read(directory / LOCK)
    if held is None or this_process() in held.processes:
        return
    living = [process for process in held.processes if process.is_here and process.is_alive]
    if living:
        raise LRSAError(_in_use(directory, living[0], held))


def _in_use(directory: Path, living: Process, held: Held) -> str:
    return (
        f"output_dir={directory} is in use by a run on host {living.host}, process {living.pid}, since {held.since}: "
        "wait for its end, stop it, or choose another output_dir."
    )


def _living(path: Path, held: Held, patience: float) -> Process | None:
    """A process of the run that holds the lock and lives, or may; None if all are dead."""
    here = [process for process in held.processes if process.is_here]
    alive = [process for process in here if process.is_alive]
    if alive:
        return alive[0]
    if here and here == held.processes:
        return None
    holder = next((p for p in held.processes if not p.is_here), Process("unknown", "", 0, 0))
    print(
        f"{path} is that of a run on host {holder.host}, process {holder.pid}: looking for {patience:g} s whether it "
        "is renewed",
        file=sys.stderr,
        flush=True,
    )
    first, deadline = _stamp(path), time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))
        if _stamp(path) != first:
            return holder
    return None


def _stamp(path: Path) -> tuple | None:
    """Changes with every renewal. The file is opened, since a shared file system shows an old time until then."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _create(path: Path, held: Held) -> bool:
    """Whether there was no such file, and now is."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(held.text())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _replace(path: Path, held: Held) -> None:
    partial = path.with_name(f"{path.name}.{held.token}.partial")
    partial.write_text(held.text(), encoding="utf-8")
    os.replace(partial, path)


def _read(path: Path) -> Held | None:
    """What the file says, or None if there is none. One that is cut short, as by a full disk, names no process."""
    for _ in range(10):
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text)
            return Held(values["token"], values["since"], [Process(**process) for process in values["processes"]])
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise LRSAError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError):
            time.sleep(0.1)  # it is just being written
    stamp = _stamp(path)
    return Held("-".join(map(str, stamp)), "an unknown time") if stamp else None
