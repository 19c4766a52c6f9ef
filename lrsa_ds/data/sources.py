"""Rows from files and from data sets of the hub: which are trained on, in which order, and which are held out."""

from collections.abc import Iterator
from glob import escape
from itertools import islice
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

from lrsa_ds.config import DataConfig
from lrsa_ds.data.files import check_rows, files_fingerprint, find_files, format_of
from lrsa_ds.data.shapes import ReadRow, row_reader
from lrsa_ds.errors import LRSAError
from lrsa_ds.hub import first_line, hub_error, resolve_name

CHECKED_UP_FRONT = 1000
SHUFFLE_BUFFER = 1000
_READ_ERRORS = (ValueError, OSError, DatasetsError)
_Data = datasets.Dataset | datasets.IterableDataset


class Rows:
    """The rows of `data.path` or `data.name`, canonical (see `lrsa_ds.data.shapes`) and split in two.

    Validation rows are the first `num_validation` of `data.validation_path` or `data.validation_split`. Without these,
    they are taken from the training rows and never trained on: the first of the order that `seed` gives, or the first
    of the stream with `data.streaming`. The order of an epoch depends on the seed and the epoch alone: a permutation,
    or, streaming, `datasets`' buffered shuffle. Picklable; several ranks may build one at the same time.

    Raises:
        LRSAError: nothing to read, nothing readable, a row of no known shape, or too few rows to hold any out.
    """

    def __init__(self, data: DataConfig, seed: int, num_validation: int, read_row: ReadRow | None = None):
        self.read_row = read_row or row_reader(dict(data.columns))
        self.seed = seed
        self.streaming = data.streaming
        self.train = _Source.of_training(data, self.read_row)
        separate = _Source.of_validation(data, self.read_row)
        if separate is not None:
            self.held_out = separate.read(num_validation)
            self.trained = None if self.streaming else np.arange(len(self.train.rows))
            self.num_skipped = 0
        elif self.streaming:
            self.held_out = self.train.read(num_validation + 1)
            self._require_enough(len(self.held_out), num_validation)
            self.held_out.pop()
            self.trained, self.num_skipped = None, num_validation
        else:
            self._require_enough(len(self.train.rows), num_validation)
            order = np.random.default_rng([seed, 0]).permutation(len(self.train.rows))
            self.held_out = [(int(i), self.train.row(int(i))) for i in order[:num_validation]]
            self.trained = order[num_validation:]
        # One row is read, so that a source which cannot serve any fails here.
        next(self.epoch(0), None)

    def _require_enough(self, num_rows: int, num_validation: int) -> None:
        if num_rows <= num_validation:
            other = "data.validation_path" if self.train.key == "data.path" else "data.validation_split"
            raise LRSAError(
                f"eval.num_examples={num_validation} rows cannot be held out of the {num_rows} of {self.train.label}: "
                f"lower eval.num_examples, add rows or set {other}."
            )

    def validation(self) -> list[tuple[int, dict[str, Any]]]:
        """The number and the content of every validation row."""
        return self.held_out

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number and the content of every training row from the `first` on, each once, in the order of this epoch.

        The number is the row's place in the source, or, streaming, its place in the order of the epoch.
        """
        if self.streaming:
            # After skip(), `datasets` keeps the order of the files: the held-out rows stay the first of the stream.
            stream = self.train.rows.skip(self.num_skipped) if self.num_skipped else self.train.rows
            stream = stream.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
            stream.set_epoch(epoch)
            yield from islice(self.train.canonical_rows(stream), first, None)
            return
        for i in np.random.default_rng([self.seed, epoch + 1]).permutation(self.trained)[first:]:
            yield int(i), self.train.row(int(i))

    def at(self, epoch: int, places: list[int]) -> dict[int, tuple[int, dict[str, Any]]]:
        """The number and the content of the rows at these places in the order of this epoch, by place.

        A stream has to be read up to the last of them; of other data nothing else is read.
        """
        if self.streaming:
            return {i: row for i, row in zip(range(max(places) + 1), self.epoch(epoch)) if i in set(places)}
        return {place: next(self.epoch(epoch, place)) for place in places}

    def fingerprint(self) -> str:
        """What the training rows are, as far as that can be told without reading all of them."""
        if self.train.files is not None:
            return f"{self.train.label}: {files_fingerprint(self.train.files)}"
        count = "a stream" if self.streaming else f"{len(self.train.rows)} rows"
        return f"{self.train.label}: {count}, columns {self.train.rows.column_names}"

    def place(self, index: int) -> str:
        """Where row `index` is, for an error."""
        return f"{self.train.label}, row {index + 1}"


class _Source:
    """One opened data set with what is needed to say where an error lies.

    Args:
        key: the setting that names it; `name` is its value.
        rows: the opened data set.
        files: the local files behind it, or None for one of the hub.
        read_row: what makes a row of it one of ours.
    """

    def __init__(self, key: str, name: str, rows: _Data, files: list[str] | None, read_row: ReadRow):
        self.key = key
        self.name = name
        self.rows = rows
        self.files = files
        self.read_row = read_row

    @property
    def label(self) -> str:
        return f"{self.key}={self.name!r}"

    @classmethod
    def of_training(cls, data: DataConfig, read_row: ReadRow) -> "_Source":
        if data.source == "files":
            return cls._open_files("data.path", data.path, data, read_row)
        return cls._open_hub("data.split", data.split, data, read_row)

    @classmethod
    def of_validation(cls, data: DataConfig, read_row: ReadRow) -> "_Source | None":
        if data.source == "files":
            path = data.validation_path
            return None if path is None else cls._open_files("data.validation_path", path, data, read_row)
        split = data.validation_split
        return None if split is None else cls._open_hub("data.validation_split", split, data, read_row)

    @classmethod
    def _open_files(cls, key: str, path: str, data: DataConfig, read_row: ReadRow) -> "_Source":
        files = find_files(key, path)
        kind = format_of(files)
        # Lines of JSON are all checked before they are copied into the cache; what may be large is checked as read.
        check_rows(files, read_row, CHECKED_UP_FRONT if data.streaming or kind == "parquet" else None)
        # `datasets` takes every name for a pattern.
        patterns = [escape(file) for file in files]
        try:
            rows = datasets.load_dataset(kind, data_files=patterns, split="train", streaming=data.streaming)
        except _READ_ERRORS as error:
            check_rows(files, read_row)
            raise LRSAError(
                f"{key}={path!r} cannot be read ({first_line(error)}): look for blank lines, and for columns whose "
                "names or types differ between rows or files."
            ) from error
        return cls(key, path, rows, files, read_row)

    @classmethod
    def _open_hub(cls, split_key: str, split: str, data: DataConfig, read_row: ReadRow) -> "_Source":
        name = resolve_name("data.name", data.name)
        try:
            rows = datasets.load_dataset(name, data.subset, split=split, streaming=data.streaming)
        except ValueError as error:
            if "BuilderConfig" in str(error) or "Config name" in str(error):
                raise LRSAError(f"data.subset={data.subset!r} of data.name={name!r}: {_flat(error)}.") from error
            if "split" in str(error):
                raise LRSAError(f"{split_key}={split!r} of data.name={name!r}: {_flat(error)}.") from error
            raise hub_error("data.name", data.name, error) from error
        except _READ_ERRORS as error:
            raise hub_error("data.name", data.name, error) from error
        return cls("data.name", data.name, rows, None, read_row)

    def row(self, index: int) -> dict[str, Any]:
        try:
            return self.read_row(self.rows[index])
        except LRSAError as error:
            raise self._located(error, index) from None

    def read(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        """The first `count` rows, or all if there are fewer."""
        return list(islice(self.canonical_rows(self.rows), count))

    def canonical_rows(self, rows: _Data) -> Iterator[tuple[int, dict[str, Any]]]:
        index = 0
        try:
            for index, row in enumerate(_plainly(rows)):
                yield index, self.read_row(row)
        except LRSAError as error:
            raise self._located(error, index) from None
        except _READ_ERRORS as error:
            raise self._located(LRSAError(f"cannot be read ({first_line(error)})."), index) from error

    def _located(self, error: LRSAError, index: int) -> LRSAError:
        """The error with its place: of files the exact line, which a second, plain reading of them finds."""
        try:
            check_rows(self.files or [], self.read_row)
        except LRSAError as exact:
            return exact
        return LRSAError(f"{self.label}, row {index + 1}: {error}")


def _plainly(rows: _Data) -> Iterator[dict[str, Any]]:
    """The rows in order. A stream is read in batches of one: its plain iterator shuffles otherwise in a worker."""
    if isinstance(rows, datasets.Dataset):
        yield from rows
    else:
        for batch in rows.iter(batch_size=1):
            yield {column: values[0] for column, values in batch.items()}


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
