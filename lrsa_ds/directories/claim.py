"""Claims the output directory of a run: rank 0 chooses it and locks it against other runs; console.log is opened."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrsa_ds.directories.console import keep_console
from lrsa_ds.directories.layout import OUTPUTS
from lrsa_ds.directories.lock import RunLock, this_process
from lrsa_ds.errors import LRSAError
from lrsa_ds.parallel.mesh import Mesh


@contextmanager
def claim(
    output_dir: str | None, run_name: str, mesh: Mesh, enter: Callable[[Path], Any]
) -> Iterator[tuple[Path, Any]]:
    """Locks the directory of a run against other runs; yields it and what `enter` returned, the same on every rank.

    Args:
        output_dir: the directory, or None for `outputs/<run_name>/<time>` by rank 0's clock.
        enter: called on rank 0 under the lock: checks the directory again, marks it and clears it.

    Raises:
        LRSAError: another run has the lock, the directory cannot be written, or `enter` raised it; on every rank.
    """
    processes = mesh.gather(this_process())
    lock: RunLock | None = None

    def take() -> tuple[str, Any]:
        nonlocal lock
        directory = Path(output_dir).expanduser() if output_dir else OUTPUTS / run_name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            directory = directory if output_dir else _new_directory(directory)
            lock = RunLock(directory)
            lock.acquire(processes)
            return str(directory), enter(directory)
        except OSError as error:
            raise LRSAError(f"output_dir={directory} cannot be written: {error.strerror}.") from error

    try:
        # The other ranks get the directory once it is cleared, since they write into it at once.
        directory, entered = mesh.on_main(take)
        keep_console(Path(directory), mesh.is_main)
        yield Path(directory), entered
    finally:
        if lock is not None:
            lock.release()


def _new_directory(parent: Path) -> Path:
    """Makes a directory named by the time; of two that are made in the same second the later one gets a number too."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    directory, number = parent / now, 1
    while True:
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            number += 1
            directory = parent / f"{now}_{number}"
