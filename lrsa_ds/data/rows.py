"""Rows, and the interface of a source of rows."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from lrsa_ds.data.packing import Example
from lrsa_ds.data.rowstreams import RowStream
from lrsa_ds.data.stores import Store
from lrsa_ds.errors import LRSAError

MakeExamples = Callable[[], list[Example]]


class Place:
    """The place of a row; formatted only when an error message needs it."""

    def __init__(self, opened: Store | RowStream, at: Any):
        self._opened, self._at = opened, at

    def __str__(self) -> str:
        return self._opened.place(self._at)


class Row(NamedTuple):
    """A row of a source.

    Args:
        index: its number in the source, or, in a stream, in the order of the epoch.
        content: the canonical row, see `lrsa_ds.data.shapes`; or the error of a row that cannot be used, with its
            place; or, for a generated row, the function that makes its examples.
        place: names the row in errors.
    """

    index: int
    content: dict[str, Any] | LRSAError | MakeExamples
    place: Place | str


class RowSource(Protocol):
    """Training rows and validation rows; see `lrsa_ds.data.sources.Rows`, which reads them."""

    @property
    def num_bad(self) -> int: ...
    @property
    def num_too_long(self) -> int: ...
    @property
    def num_trained(self) -> int | None: ...
    @property
    def num_all(self) -> int | None: ...
    def validation(self) -> list[Row]: ...
    def longest(self) -> list[Row]: ...
    def epoch(self, epoch: int, first: int = 0) -> Iterator[Row]: ...
    def at(self, epoch: int, places: list[int]) -> dict[int, Row]: ...
    def order(self, epoch: int) -> np.ndarray | None: ...
    def fingerprint(self) -> str: ...
