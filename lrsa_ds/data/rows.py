"""A row, and what a source of rows offers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from lrsa_ds.data.packing import Example
from lrsa_ds.data.rowstreams import RowStream
from lrsa_ds.data.stores import Store
from lrsa_ds.errors import LRSAError

MakeExamples = Callable[[], list[Example]]


class Place:
    """Where a row is, put into words when it is written into an error."""

    def __init__(self, opened: Store | RowStream, at: Any):
        self._opened, self._at = opened, at

    def __str__(self) -> str:
        return self._opened.place(self._at)


class Row(NamedTuple):
    """A row of a source.

    Args:
        index: its number in the source, or, streaming, in the order of the epoch.
        content: canonical, see `lrsa_ds.data.shapes`; or the error of a row that cannot be used, with its place; or, of
            a row that is made rather than read, what makes its examples.
        place: where it is.
    """

    index: int
    content: dict[str, Any] | LRSAError | MakeExamples
    place: Place | str


class RowSource(Protocol):
    """Rows that are trained on and rows that are held out; see `Rows`, which reads them."""

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
