"""The rows of a user's copy of a benchmark, each with the task that its file or folder names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lrsa_ds.data.files import find_files
from lrsa_ds.data.stores import rows_of
from lrsa_ds.errors import LRSAError

# Names of files that name a part of the data instead of the task.
PARTS = ("validation", "test")


class Row(NamedTuple):
    """A row as it was read; `place` names it in errors, and `folders` are those above its file, the nearest last."""

    place: str
    stem: str
    folders: tuple[str, ...]
    content: dict[str, Any]

    @property
    def task(self) -> str:
        """The name of the file, or of its folder if the file is one part of the data."""
        is_part = self.stem.split("-")[0] in PARTS  # Parquet: test-00000-of-00001
        return self.folders[-1] if is_part else self.stem


def benchmark_rows(key: str, path: str, ignored: str = "") -> Iterator[Row]:
    """All rows of the files that `path` names, of a directory with its subfolders.

    Args:
        key: the setting that holds the path.
        ignored: a folder whose files are something else.

    Raises:
        LRSAError: there is no such file, nothing but `ignored`, or a row is no object.
    """
    found = False
    for file in find_files(key, path, subfolders=True):
        folders = Path(file).resolve().parent.parts
        if folders[-1] == ignored:
            continue
        found = True
        for place, row in rows_of(file):
            if not isinstance(row, dict):
                raise LRSAError(f"{place}: a row has to be an object with named columns.")
            yield Row(place, Path(file).stem, folders, row)
    if not found:
        raise LRSAError(f"{key}={path!r} holds no tasks, only files below {ignored}: give the folder of the data.")
