"""Stores: opened sources whose rows are read by number. All rows are read and checked once when a store is opened.

A store has a label for errors, a length, `read(index)` for a row as it was read, `place(index)` to name it, and
`fingerprint()`. A row that cannot be read, or that `read_row` refuses, raises an error at opening. With `keep_bad` the
row keeps its number instead, and its error is kept in `bad`: the numbers of other rows do not depend on it.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from glob import escape
from itertools import accumulate, groupby
from typing import Any, Protocol, cast

import datasets
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from lrsa_ds.data.files import ContentDigest, is_parquet
from lrsa_ds.data.jsonfiles import Found, SpanIndex, found_rows, place_of, read_span, rows_in, spans_of
from lrsa_ds.data.shapes import ReadRow, uncut_length
from lrsa_ds.errors import LRSAError
from lrsa_ds.hub import cache_error, first_line

READ_ERRORS = (ValueError, OSError, DatasetsError, pyarrow.ArrowException)
_BATCH = 64
NUM_LONGEST = 32


class Store(Protocol):
    """See the head of this file."""

    label: str
    bad: dict[int, LRSAError]
    longest: list[int]  # rows with the most characters that are never cut, longest first

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """The row as it was read. Raises LRSAError with its place if it cannot be read."""

    def place(self, index: int) -> str:
        """Where row `index` is, for an error."""

    def fingerprint(self) -> str:
        """Identifies the rows: it changes with their content."""


def file_store(label: str, files: list[str], read_row: ReadRow, columns: list[str] | None, keep_bad: bool) -> Store:
    """The rows of JSON or Parquet files, in order.

    Args:
        columns: the columns that are used, or None for all; Parquet files are read in these columns only.

    Raises:
        LRSAError: a file has no rows or cannot be read, or a row is bad; it names the file and the line or row.
    """
    if is_parquet(files[0]):
        return _ParquetStore(label, files, read_row, columns, keep_bad)
    return _JSONStore(label, files, read_row, keep_bad)


def rows_of(path: str) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON or Parquet file, unchanged, with the place of each."""
    if is_parquet(path):
        for number, row in enumerate(parquet_rows(path, None), start=1):
            yield f"{path}, row {number}", row
        return
    for found in found_rows(path):
        rows = rows_in(found)
        for row, span in zip(rows, spans_of(found, len(rows)), strict=True):
            yield place_of(found.path, span), row


def without_none(value: Any) -> Any:
    """Removes the None values that Arrow adds to objects that lack a key of other objects."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value[:1]):
        return [without_none(item) for item in value]
    return value


class _Checks:
    """Checks every row once; keeps the errors, or raises the first, and keeps the numbers of the longest rows."""

    def __init__(self, read_row: ReadRow, keep_bad: bool):
        self.read_row, self.keep_bad = read_row, keep_bad
        self.errors: dict[int, LRSAError] = {}
        self._longest: list[tuple[int, int]] = []

    def check(self, index: int, row: Any, place: str) -> None:
        try:
            length = uncut_length(self.read_row(row))
        except LRSAError as error:
            self.add(index, LRSAError(f"{place}: {error}"))
            return
        add = heapq.heappush if len(self._longest) < NUM_LONGEST else heapq.heappushpop
        add(self._longest, (length, index))

    def add(self, index: int, error: LRSAError) -> None:
        if not self.keep_bad:
            raise error
        self.errors[index] = error

    @property
    def longest(self) -> list[int]:
        return [index for _, index in sorted(self._longest, reverse=True)]


class _JSONStore:
    def __init__(self, label: str, files: list[str], read_row: ReadRow, keep_bad: bool):
        self.label, self.files = label, files
        self._index, checks, digest = SpanIndex(files), _Checks(read_row, keep_bad), ContentDigest()
        for path in files:
            before = len(self._index)
            for found in found_rows(path, digest.update):
                self._add(found, checks)
            if len(self._index) == before:
                raise LRSAError(f"{path} is empty: it has no rows.")
            self._index.end_file()
            digest.end_file()
        self.bad, self.longest, self._content = checks.errors, checks.longest, str(digest)

    def _add(self, found: Found, checks: _Checks) -> None:
        try:
            rows = rows_in(found)
        except LRSAError as error:
            checks.add(len(self._index), error)
            self._index.add(spans_of(found, 1)[0])
            return
        for row, span in zip(rows, spans_of(found, len(rows)), strict=True):
            checks.check(len(self._index), row, place_of(found.path, span))
            self._index.add(span)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Any:
        return read_span(*self._index[index])

    def place(self, index: int) -> str:
        return place_of(*self._index[index])

    def fingerprint(self) -> str:
        return f"{self.label}: {self._content}"


class _ParquetStore:
    """Consecutive files with the same schema are opened together: columns may differ between files."""

    def __init__(self, label: str, files: list[str], read_row: ReadRow, columns: list[str] | None, keep_bad: bool):
        self.label, self.files = label, files
        digest, checks = ContentDigest(), _Checks(read_row, keep_bad)
        self._ends: list[int] = []  # for each file: the number of rows up to its end
        count = 0
        for path in files:
            for number, row in enumerate(parquet_rows(path, columns), start=1):
                checks.check(count, row, f"{path}, row {number}")
                count += 1
            self._ends.append(count)
            digest.update_file(path)
        self.bad, self.longest, self._content = checks.errors, checks.longest, str(digest)
        groups = [list(group) for _, group in groupby(files, lambda path: _used_schema(path, columns))]
        self._tables = [self._opened(group, columns) for group in groups]
        self._table_ends = list(accumulate(map(len, self._tables)))

    def _opened(self, files: list[str], columns: list[str] | None) -> datasets.Dataset:
        patterns = [escape(path) for path in files]  # `datasets` treats every name as a pattern
        names = _used_schema(files[0], columns).names
        try:
            return datasets.load_dataset("parquet", data_files=patterns, split="train", columns=names)
        except READ_ERRORS as error:
            reason = LRSAError(f"{self.label} cannot be read ({first_line(error)}).")
            raise (cache_error(error) or reason) from error

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Any:
        table = bisect_right(self._table_ends, index)
        return without_none(self._tables[table][index - (self._table_ends[table - 1] if table else 0)])

    def place(self, index: int) -> str:
        file = bisect_right(self._ends, index)
        return f"{self.files[file]}, row {index - (self._ends[file - 1] if file else 0) + 1}"

    def fingerprint(self) -> str:
        return f"{self.label}: {self._content}"


def parquet_rows(path: str, columns: list[str] | None) -> Iterator[Any]:
    """The rows of a Parquet file in order, with None in the columns that are not read.

    Raises:
        LRSAError: the file cannot be read, or has no rows.
    """
    try:
        names = _used_schema(path, columns).names
        with pyarrow.parquet.ParquetFile(path) as file:
            unused = dict.fromkeys(file.schema_arrow.names)
            if file.metadata.num_rows == 0:
                raise LRSAError(f"{path} is empty: it has no rows.")
            for batch in file.iter_batches(batch_size=_BATCH, columns=names):
                for row in batch.to_pylist():
                    yield {**unused, **without_none(row)}
    except (pyarrow.ArrowException, OSError) as error:
        raise LRSAError(f"{path} is not a readable Parquet file ({first_line(error).rstrip('.')}).") from None


def _used_schema(path: str, columns: list[str] | None) -> pyarrow.Schema:
    """The columns of a Parquet file that are used; all of them if the file has none of `columns`."""
    schema = pyarrow.parquet.read_schema(path)
    used = [field for field in schema if columns is None or field.name in columns]
    return pyarrow.schema(used or schema)


class HubStore:
    """A data set of the hub, which `datasets` has copied to this machine.

    Args:
        identity: identifies its content.
    """

    def __init__(self, label: str, rows: datasets.Dataset, identity: str, read_row: ReadRow, keep_bad: bool):
        self.label, self._rows, self._identity, checks = label, rows, identity, _Checks(read_row, keep_bad)
        index = 0
        for batch in rows.iter(batch_size=_BATCH):
            for row in _rows_of_batch(cast(dict[str, list], batch)):
                checks.check(index, row, self.place(index))
                index += 1
        self.bad, self.longest = checks.errors, checks.longest

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Any:
        return without_none(self._rows[index])

    def place(self, index: int) -> str:
        return f"{self.label}, row {index + 1}"

    def fingerprint(self) -> str:
        return f"{self.label}: {len(self)} rows of {self._identity}"


def _rows_of_batch(batch: dict[str, list]) -> Iterator[Any]:
    for values in zip(*batch.values(), strict=True):
        yield without_none(dict(zip(batch, values, strict=True)))
