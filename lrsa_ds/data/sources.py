"""Rows from files and from data sets of the hub: which are trained on, in which order, and which are held out."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import datasets
import numpy as np

from lrsa_ds.data.files import find_files
from lrsa_ds.data.rows import Place, Row
from lrsa_ds.data.rowstreams import FileStream, HubStream, RowStream
from lrsa_ds.data.shapes import USED_COLUMNS, ToRow, row_reader
from lrsa_ds.data.stores import READ_ERRORS, HubStore, Store, file_store
from lrsa_ds.errors import LRSAError
from lrsa_ds.hub import hub_error, resolve_name
from lrsa_ds.notices import say_once
from lrsa_ds.settings.data import DataConfig

# If rows are few and `eval.num_examples` is a default, one row in this many is held out.
ROWS_TO_ONE = 4


class Rows:
    """The rows of `data.path` or `data.name`, split into training rows and validation rows.

    Validation rows are the first `num_validation` of `data.validation_path` or `data.validation_split`. If neither is
    set, they are held out of the training rows: the first in an order that `seed` gives, or, with `data.streaming`, the
    first of the stream. The order of an epoch depends on the seed and the epoch only: it is a permutation, or, with
    `data.streaming`, the order of a shuffle buffer. Picklable; several ranks may build one at the same time.

    Args:
        to_row: converts a row, as the file or the data set holds it, to one of the known shapes.
        allow_fewer: whether, if there are few rows, at most a quarter of them and at least one is held out.
        needs: a key that every canonical row must have; a row without it is a bad row.

    Raises:
        LRSAError: there is nothing to read, it cannot be read, a row is bad (with `data.on_bad_row=error`), or there
            are too few rows to hold any out. All rows are checked here; of a stream, the first 1,000.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        num_validation: int,
        to_row: ToRow | None = None,
        allow_fewer: bool = False,
        needs: str | None = None,
    ):
        self.seed, self.allow_fewer = seed, allow_fewer
        self.read_row = row_reader(dict(data.columns), to_row, needs)
        # It is not known which columns a user's function reads.
        self.columns = [*USED_COLUMNS, *data.columns.values()] if to_row is None else None
        self.keep_bad = data.on_bad_row == "skip"
        opened = self._open(data, validation=False)
        separate = self._open(data, validation=True)
        self.streaming = data.streaming
        assert opened is not None  # only validation rows are optional
        self.source = self._rows_of(opened)
        if separate is None:
            other = "data.validation_path" if data.source == "files" else "data.validation_split"
            self.held_out = self.source.hold_out(num_validation, other)
            self.num_held_out = len(self.held_out)
        else:
            held = self._rows_of(separate)
            self.held_out = list(islice(held.good_rows(), num_validation))
            self.num_held_out = 0
        # Read one row, so that a source without a usable row fails here.
        next(self.epoch(0), None)

    def _rows_of(self, opened: Store | RowStream) -> "_Stored | _Streamed":
        if isinstance(opened, (FileStream, HubStream)):
            return _Streamed(opened, self)
        return _Stored(cast(Store, opened), self)

    def _open(self, data: DataConfig, validation: bool) -> "Store | RowStream | None":
        if data.source == "files":
            key, path = ("data.validation_path", data.validation_path) if validation else ("data.path", data.path)
            if path is None:
                return None
            files = find_files(key, path)
            if data.streaming:
                return FileStream(f"{key}={path!r}", files, self.columns)
            return file_store(f"{key}={path!r}", files, self.read_row, self.columns, self.keep_bad)
        key, split = ("data.validation_split", data.validation_split) if validation else ("data.split", data.split)
        if split is None:
            return None
        rows, identity = _open_hub(key, split, data)
        if isinstance(rows, datasets.IterableDataset):
            return HubStream(f"data.name={data.name!r}", rows, identity)
        return HubStore(f"data.name={data.name!r}", rows, identity, self.read_row, self.keep_bad)

    def validation(self) -> list[Row]:
        """Every validation row."""
        return self.held_out

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Row]:
        """The training rows of this epoch in order, from row `first` on, each once."""
        return self.source.epoch(epoch, first)

    @property
    def num_trained(self) -> int | None:
        """Training rows, including bad ones; None for a stream, whose length is unknown."""
        return self.source.num_trained

    @property
    def num_all(self) -> int | None:
        """All rows of the source, including those held out; None for a stream."""
        return self.source.num_all

    @property
    def num_bad(self) -> int:
        """Training rows that are known to be bad."""
        return self.source.num_bad

    @property
    def num_too_long(self) -> int:
        """Rows that are known to be too long: 0, since rows are not encoded yet."""
        return 0

    def first_error(self) -> LRSAError | None:
        """The error of the first row that is known to be bad, if any."""
        return self.source.first_error()

    def longest(self) -> list[Row]:
        """The rows that are most likely too long, even after cutting; none for a stream, which has not read them."""
        return self.source.longest()

    def order(self, epoch: int) -> np.ndarray | None:
        """The numbers of the training rows in the order of this epoch; None for a stream."""
        return self.source.order(epoch)

    def at(self, epoch: int, places: list[int]) -> dict[int, Row]:
        """The rows at these places in the order of this epoch, by place; places beyond its end are left out.

        A stream is read up to the last of these places; other sources read these rows only.
        """
        return self.source.at(epoch, places)

    def fingerprint(self) -> str:
        """Identifies the training rows: it changes with their content and with the number of rows held out."""
        return f"{self.source.opened.fingerprint()}, {self.num_held_out} rows held out"


class _Stored:
    """Training rows that are read by number."""

    def __init__(self, opened: Store, rows: Rows):
        self.opened, self.seed, self.read_row, self.allow_fewer = opened, rows.seed, rows.read_row, rows.allow_fewer
        self.trained = np.arange(len(opened))
        self._last_order: tuple[int, np.ndarray] | None = None

    @property
    def num_trained(self) -> int:
        return len(self.trained)

    @property
    def num_all(self) -> int:
        return len(self.opened)

    @property
    def num_bad(self) -> int:
        return sum(index in self.opened.bad for index in self.trained.tolist()) if self.opened.bad else 0

    def first_error(self) -> LRSAError | None:
        return next(iter(self.opened.bad.values()), None)

    def order(self, epoch: int) -> np.ndarray:
        if self._last_order is None or self._last_order[0] != epoch:
            self._last_order = epoch, np.random.default_rng([self.seed, epoch + 1]).permutation(self.trained)
        return self._last_order[1]

    def row(self, index: int) -> Row:
        bad = self.opened.bad.get(index)
        return _row(self, index, index) if bad is None else Row(index, bad, Place(self.opened, index))

    def longest(self) -> list[Row]:
        return [self.row(index) for index in self.opened.longest]

    def good_rows(self) -> Iterator[Row]:
        return (self.row(index) for index in range(len(self.opened)) if index not in self.opened.bad)

    def hold_out(self, count: int, other: str) -> list[Row]:
        num_good = len(self.opened) - len(self.opened.bad)
        if self.allow_fewer:
            count = _fewer(num_good, count, self.opened.label)
        order = np.random.default_rng([self.seed, 0]).permutation(len(self.opened))
        good = (int(index) for index in order if int(index) not in self.opened.bad)
        held = list(islice(good, count))
        _require_more(num_good, count, self.opened.label, other)
        self.trained = order[~np.isin(order, held)]
        return [self.row(index) for index in held]

    def epoch(self, epoch: int, first: int) -> Iterator[Row]:
        for index in self.order(epoch)[first:]:
            yield self.row(int(index))

    def at(self, epoch: int, places: list[int]) -> dict[int, Row]:
        order = self.order(epoch)
        return {place: self.row(int(order[place])) for place in places if place < len(order)}


class _Streamed:
    """Training rows that are read in order. The first of them are checked at once."""

    num_trained, num_all, num_bad = None, None, 0

    def __init__(self, opened: RowStream, rows: Rows):
        self.opened, self.seed, self.read_row, self.allow_fewer = opened, rows.seed, rows.read_row, rows.allow_fewer
        self.keep_bad, self.num_skipped = rows.keep_bad, 0
        for _ in islice(self.good_rows(), self.opened.num_checked):
            pass

    def first_error(self) -> None:
        return None

    def order(self, epoch: int) -> None:
        return None

    def longest(self) -> list[Row]:
        return []

    def good_rows(self) -> Iterator[Row]:
        """The usable rows in the order of the source; a bad row is skipped if that is allowed, or raises its error."""
        for index, handle in enumerate(self.opened.handles(None, 0)):
            row = _row(self, index, handle)
            if not isinstance(row.content, LRSAError):
                yield row
            elif not self.keep_bad:
                raise row.content

    def hold_out(self, count: int, other: str) -> list[Row]:
        """The first usable rows; bad rows among them are not trained on either."""
        if self.allow_fewer:
            count = _fewer(sum(1 for _ in islice(self.good_rows(), ROWS_TO_ONE * count)), count, self.opened.label)
        found = list(islice(self.good_rows(), count + 1))
        _require_more(len(found), count, self.opened.label, other)
        self.num_skipped = found[count].index
        return found[:count]

    def epoch(self, epoch: int, first: int) -> Iterator[Row]:
        handles = enumerate(self.opened.handles((self.seed, epoch), self.num_skipped))
        return (_row(self, index, handle) for index, handle in islice(handles, first, None))

    def at(self, epoch: int, places: list[int]) -> dict[int, Row]:
        handles = enumerate(self.opened.handles((self.seed, epoch), self.num_skipped))
        wanted = set(places)
        passed = islice(handles, max(wanted, default=-1) + 1)
        return {index: _row(self, index, handle) for index, handle in passed if index in wanted}


def _fewer(num_rows: int, num_validation: int, label: str) -> int:
    """How many rows are held out if their number is a default: at most one in `ROWS_TO_ONE`, and at least one."""
    fewer = max(1, min(num_validation, num_rows // ROWS_TO_ONE))
    if fewer < num_validation:
        say_once(
            f"eval.num_examples={num_validation} is a default, and {label} has {num_rows} rows: {fewer} of them are "
            "held out."
        )
    return fewer


def _row(source: "_Stored | _Streamed", index: int, at: Any) -> Row:
    """Row `index`; `at` is its number in a store, or its handle in a stream."""
    place = Place(source.opened, at)
    try:
        raw = source.opened.read(at)
    except LRSAError as error:  # it names the place
        return Row(index, error, place)
    try:
        return Row(index, source.read_row(raw), place)
    except LRSAError as error:
        return Row(index, LRSAError(f"{place}: {error}"), place)


def _require_more(num_rows: int, num_validation: int, label: str, other: str) -> None:
    if num_rows <= num_validation:
        raise LRSAError(
            f"eval.num_examples={num_validation} rows cannot be held out of the {num_rows} of {label}: "
            f"lower eval.num_examples, add rows or set {other}."
        )


def _open_hub(split_key: str, split: str, data: DataConfig) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """The rows of a split, and a hash that identifies them: it changes with the files and their revision."""
    assert data.name is not None
    name = resolve_name("data.name", data.name)
    try:
        builder = datasets.load_dataset_builder(name, data.subset)
        if data.streaming:
            rows = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        assert not isinstance(rows, dict)  # a dict holds all splits
        return rows, str(builder.hash)
    except ValueError as error:
        if "BuilderConfig" in str(error) or "Config name" in str(error):
            raise LRSAError(f"data.subset={data.subset!r} of data.name={name!r}: {_flat(error)}.") from error
        if "split" in str(error):
            raise LRSAError(f"{split_key}={split!r} of data.name={name!r}: {_flat(error)}.") from error
        raise hub_error("data.name", data.name, error) from error
    except READ_ERRORS as error:
        raise hub_error("data.name", data.name, error) from error


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
