"""Streams: opened sources whose rows are read in order and shuffled in a buffer. No row is read before it is needed.

A stream yields *handles*, which are cheap to skip: the span of a row of a JSON file, or the row itself.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import pyarrow.parquet

from lrsa_ds.data.files import is_parquet, sampled_fingerprint
from lrsa_ds.data.jsonfiles import Found, Span, found_rows, place_of, read_span, spans_of
from lrsa_ds.data.stores import READ_ERRORS, parquet_rows, without_none
from lrsa_ds.errors import LRSAError
from lrsa_ds.hub import first_line

# Size of the shuffle buffer in handles, and limit in bytes for the rows of Parquet files in it.
SHUFFLE_BUFFER, BUFFER_BYTES = 1000, 256 << 20


class RowStream(Protocol):
    """See the head of this file; the same on every rank."""

    label: str
    num_checked: int  # rows that are checked before training

    def handles(self, order: tuple[int, int] | None, skip: int) -> Iterator[Any]:
        """Handles of all rows but the first `skip`, in the order of the source, or shuffled by a seed and an epoch."""

    def read(self, handle: Any) -> Any:
        """The row as it was read. Raises LRSAError with its place if it cannot be read."""

    def place(self, handle: Any) -> str:
        """Where the row is, for an error."""

    def fingerprint(self) -> str:
        """Identifies the rows, as far as possible without reading all of them."""


class _Handle(NamedTuple):
    """A row of a file: its span in a JSON file; its number and the row itself in a Parquet file."""

    path: str
    at: Span | int
    row: Any = None


class FileStream:
    """The rows of JSON or Parquet files.

    Args:
        columns: as in `lrsa_ds.data.stores.file_store`.
    """

    num_checked = 1000

    def __init__(self, label: str, files: list[str], columns: list[str] | None):
        self.label, self.files, self.columns = label, files, columns

    def handles(self, order: tuple[int, int] | None, skip: int) -> Iterator[_Handle]:
        if order is None:
            yield from islice(self._in_order(self.files), skip, None)
            return
        # The first rows are skipped, wherever their files are in the shuffled order.
        skipped = {(handle.path, handle.at) for handle in islice(self._in_order(self.files), skip)}
        random = np.random.default_rng(order)
        files = [self.files[i] for i in random.permutation(len(self.files))]
        rows = (handle for handle in self._in_order(files) if (handle.path, handle.at) not in skipped)
        yield from _mixed(rows, random, self._buffer_size())

    def _in_order(self, files: list[str]) -> Iterator[_Handle]:
        for path in files:
            is_empty = True
            for handle in self._of_file(path):
                is_empty = False
                yield handle
            if is_empty:
                raise LRSAError(f"{path} is empty: it has no rows.")

    def _of_file(self, path: str) -> Iterator[_Handle]:
        if is_parquet(path):
            for number, row in enumerate(parquet_rows(path, self.columns), start=1):
                yield _Handle(path, number, row)
        else:
            for found in found_rows(path):
                for span in _spans(found):
                    yield _Handle(path, span)

    def _buffer_size(self) -> int:
        """Handles in the shuffle buffer; fewer for Parquet files, whose handles hold complete rows."""
        if not is_parquet(self.files[0]):
            return SHUFFLE_BUFFER
        metadata = pyarrow.parquet.read_metadata(self.files[0])
        num_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        return min(SHUFFLE_BUFFER, max(1, BUFFER_BYTES * metadata.num_rows // max(1, num_bytes)))

    def read(self, handle: _Handle) -> Any:
        if isinstance(handle.at, int):
            return handle.row
        return read_span(handle.path, handle.at)

    def place(self, handle: _Handle) -> str:
        return f"{handle.path}, row {handle.at}" if isinstance(handle.at, int) else place_of(handle.path, handle.at)

    def fingerprint(self) -> str:
        return f"{self.label}: {sampled_fingerprint(self.files)}"


def _spans(found: Found) -> list[Span]:
    try:
        return spans_of(found)
    except LRSAError:  # the error is raised when the row is read
        return spans_of(found, 1)


def _mixed(rows: Iterator[Any], random: np.random.Generator, size: int) -> Iterator[Any]:
    """The rows, each once: a random one of the `size` rows in the buffer is next."""
    buffer = list(islice(rows, size))
    for row in rows:
        place = int(random.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[i] for i in random.permutation(len(buffer)))


class HubStream:
    """A data set of the hub, read over the network.

    Args:
        identity: identifies its content.
    """

    num_checked = 0

    def __init__(self, label: str, rows: datasets.IterableDataset, identity: str):
        self.label, self._rows, self._identity = label, rows, identity

    def handles(self, order: tuple[int, int] | None, skip: int) -> Iterator[tuple[int, Any]]:
        # After skip(), `datasets` does not shuffle the files: the rows skipped are always the first of the stream.
        rows = self._rows.skip(skip) if skip else self._rows
        if order is not None:
            rows = rows.shuffle(seed=order[0], buffer_size=SHUFFLE_BUFFER)
            rows.set_epoch(order[1])
        number = 0
        try:
            # In batches of one row: in a worker, the plain iterator shuffles differently.
            for number, batch in enumerate(rows.iter(batch_size=1), start=1):
                yield number, without_none({column: values[0] for column, values in batch.items()})
        except READ_ERRORS as error:
            raise LRSAError(f"{self.label}, row {number + 1}: cannot be read ({first_line(error)}).") from error

    def read(self, handle: tuple[int, Any]) -> Any:
        return handle[1]

    def place(self, handle: tuple[int, Any]) -> str:
        return f"{self.label}, row {handle[0]}"

    def fingerprint(self) -> str:
        return f"{self.label}: a stream of {self._identity}, columns {self._rows.column_names}"
