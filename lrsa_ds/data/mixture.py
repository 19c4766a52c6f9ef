"""Rows of several sources, mixed by weights; the order can be resumed at any place."""

from collections.abc import Callable, Iterator

import numpy as np

from lrsa_ds.data.rows import Row, RowSource
from lrsa_ds.data.sources import Rows
from lrsa_ds.settings.data import DataConfig

OpenSource = Callable[[DataConfig, int, int], RowSource]
"""Opens one source: from its settings, a seed and a number of validation rows to its rows."""


def open_rows(data: DataConfig, seed: int, num_validation: int, open_source: OpenSource = Rows) -> RowSource:
    """Opens the rows that `data` names: one source or several."""
    if data.source == "mixture":
        return Mixture(data, seed, num_validation, open_source)
    return open_source(data, seed, num_validation)


class Mixture:
    """The rows of `data.sources`; the members are those of `RowSource`.

    An epoch has as many rows as all sources together, shared among the sources by their weights. A source with fewer
    rows than its share starts again, in another order. A source with more rows resumes in the next epoch where it
    stopped. So no row of a source is repeated before all its other rows were read. Without weights every row is read
    once.

    Validation rows are shared by the same weights, at least one for each source; a source with `num_validation` has
    that many.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        num_validation: int,
        open_source: OpenSource,
    ):
        self.seed = seed
        weights = [source.weight for source in data.sources]
        self.has_weights = None not in weights
        counts = shares(num_validation, weights if self.has_weights else [1.0] * len(weights))
        self.sources = [
            open_source(data.of_source(source), seed + number, source.num_validation or max(1, count))
            for number, (source, count) in enumerate(zip(data.sources, counts, strict=True))
        ]
        self._sizes = [_known(source.num_trained) for source in self.sources]
        self.num_trained = sum(self._sizes)
        self.num_of_source = shares(self.num_trained, weights) if self.has_weights else self._sizes
        # Row numbers are unique among all sources: each source counts on from the one before.
        ends = np.cumsum([_known(source.num_all) for source in self.sources])
        self.first_number = np.concatenate([[0], ends]).tolist()
        self._num_all = int(ends[-1])
        self._weights = weights
        self._last_order: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def num_bad(self) -> int:
        return sum(source.num_bad for source in self.sources)

    @property
    def num_all(self) -> int:
        return self._num_all

    @property
    def num_too_long(self) -> int:
        return sum(source.num_too_long for source in self.sources)

    def validation(self) -> list[Row]:
        return [self._numbered(i, row) for i, source in enumerate(self.sources) for row in source.validation()]

    def longest(self) -> list[Row]:
        return [self._numbered(i, row) for i, source in enumerate(self.sources) for row in source.longest()]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Row]:
        for place in range(first, self.num_trained):
            yield self._row(epoch, place)

    def at(self, epoch: int, places: list[int]) -> dict[int, Row]:
        return {place: self._row(epoch, place) for place in places if place < self.num_trained}

    def order(self, epoch: int) -> np.ndarray | None:
        """As in `Rows`; None with weights or contexts, where the rows of an epoch are not those of another."""
        if self.has_weights:
            return None
        sources, draws = self._draws(epoch)
        known = [order for source in self.sources if (order := source.order(epoch)) is not None]
        if len(known) < len(self.sources):
            return None
        orders = [order + self.first_number[i] for i, order in enumerate(known)]
        numbers = np.empty(len(sources), dtype=np.int64)
        for i, order in enumerate(orders):
            numbers[sources == i] = order[draws[sources == i] % len(order)]
        return numbers

    def fingerprint(self) -> str:
        parts = [f"{source.fingerprint()}, weight {w}" for source, w in zip(self.sources, self._weights, strict=True)]
        return "; ".join(parts)

    def _row(self, epoch: int, place: int) -> Row:
        sources, draws = self._draws(epoch)
        number, draw = int(sources[place]), int(draws[place])
        source = self.sources[number]
        times, at = divmod(draw, self._sizes[number])
        # An epoch of contexts may have fewer than epoch 0: a draw beyond its end takes the first context.
        found = source.at(times, [at]) or source.at(times, [0])
        return self._numbered(number, *found.values())

    def _numbered(self, number: int, row: Row) -> Row:
        return row._replace(index=self.first_number[number] + row.index)

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of an epoch: its source, and how many rows were drawn from that source before."""
        if self._last_order is None or self._last_order[0] != epoch:
            sources = np.repeat(np.arange(len(self.sources)), self.num_of_source)
            sources = np.random.default_rng([self.seed, epoch + 1, len(self.sources)]).permutation(sources)
            draws = np.empty(len(sources), dtype=np.int64)
            for number, count in enumerate(self.num_of_source):
                draws[sources == number] = epoch * count + np.arange(count)
            self._last_order = epoch, sources, draws
        return self._last_order[1:]


def shares(total: int, weights: list[float]) -> list[int]:
    """Whole numbers in proportion to the weights, by the method of largest remainders; they sum to `total`."""
    exact = np.array(weights, dtype=float) / sum(weights) * total
    parts = np.floor(exact).astype(int)
    largest = np.argsort(parts - exact, kind="stable")[: total - parts.sum()]
    parts[largest] += 1
    return parts.tolist()


def _known(count: int | None) -> int:
    assert count is not None, "the sources of a mixture are not streamed"
    return count
