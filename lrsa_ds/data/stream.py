"""The endless stream of training steps: the same for any number of ranks, and resumable at any step."""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import fsspec.asyn
from torch.utils.data import DataLoader, IterableDataset

from lrsa_ds.data.packing import Example, LeftOut, PackedSequence, Packer, packed
from lrsa_ds.errors import LRSAError


class TrainingRows(Protocol):
    """The data of a training run; see `recipes.qa.QAData`."""

    seq_len: int
    pad_id: int

    def examples_of_rows(self, epoch: int, first: int = 0) -> Iterator[list[Example]]:
        """The examples of every row of an epoch, in order, from row `first` on; the same on every rank.

        For a row that cannot be used it raises an LRSAError, or yields a `LeftOut`.
        """

    def examples_at(self, epoch: int, rows: list[int]) -> dict[int, list[Example]]:
        """The examples of the rows at these places in the order of an epoch, without reading all rows before them."""


@dataclass(frozen=True)
class Position:
    """The position of a stream, in plain numbers that can be saved as JSON.

    Args:
        epoch, row: the next row to read.
        open, ready: sequences that are being packed, and packed sequences that were not taken yet; each is given by the
            places of its examples, as in `Example.place`.
        again: rows, as epoch and row, that are read before all others; see `reread`.
    """

    epoch: int = 0
    row: int = 0
    open: list[list[list[int]]] = field(default_factory=list)
    ready: list[list[list[int]]] = field(default_factory=list)
    again: list[list[int]] = field(default_factory=list)


def reread(position: dict) -> dict:
    """The position to resume at if the data have changed, since packed examples may have changed as well.

    The rows of open and ready sequences are read again, completely and in order, and packed again.
    """
    places = [place for places in (*position["ready"], *position["open"]) for place in places]
    again = sorted({(epoch, row) for epoch, row, _ in places})
    return asdict(Position(position["epoch"], position["row"], again=[list(place) for place in again]))


@dataclass(frozen=True)
class StepData:
    """This rank's packed sequences of one optimizer step, and the position of the stream after it (on all ranks).

    `left_out` are the rows that were read for the step and left out; `num_cut_tokens` and `num_lost_answers` are sums
    over the examples of the step (see `Example`). All three are the same on all ranks.
    """

    sequences: list[PackedSequence]
    position: dict
    left_out: list[LeftOut] = field(default_factory=list)
    num_cut_tokens: int = 0
    num_lost_answers: int = 0


class SequenceOrder:
    """The global order of packed sequences: epochs 0, 1, 2, ... in turn, from `position` on."""

    def __init__(self, data: TrainingRows, position: Position):
        self.data = data
        self.packer = Packer(data.seq_len)
        self.epoch, self.row = position.epoch, position.row
        self.left_out: list[LeftOut] = []
        examples = self._examples([place for places in (*position.open, *position.ready) for place in places])
        self.packer.restore([[examples[tuple(place)] for place in places] for places in position.open])
        self.ready = deque([examples[tuple(place)] for place in places] for places in position.ready)
        self.rows = data.examples_of_rows(self.epoch, self.row)
        self.is_empty = self.row == 0
        self._read_again(position.again)

    def _read_again(self, rows: list[list[int]]) -> None:
        for epoch in sorted({epoch for epoch, _ in rows}):
            # Rows that no longer exist are not found.
            found = self.data.examples_at(epoch, [row for e, row in rows if e == epoch])
            for row, examples in sorted(found.items()):
                self._pack(examples, epoch, row)

    def _examples(self, places: list[list[int]]) -> dict[tuple[int, ...], Example]:
        """Makes the examples at these places again."""
        found: dict[tuple[int, ...], Example] = {}
        for epoch in {place[0] for place in places}:
            rows = self.data.examples_at(epoch, sorted({place[1] for place in places if place[0] == epoch}))
            for _, row, number in (place for place in places if place[0] == epoch):
                found[epoch, row, number] = replace(rows[row][number], place=(epoch, row, number))
        return found

    def next(self) -> list[Example]:
        """The members of the next sequence."""
        while not self.ready:
            self._read_row()
        return self.ready.popleft()

    def _read_row(self) -> None:
        examples = next(self.rows, None)
        if examples is None:
            if self.is_empty:
                raise LRSAError(
                    f"The training data has no example in epoch {self.epoch}: check data.path or data.name."
                )
            self.ready.extend(self.packer.flush())
            self.epoch, self.row, self.is_empty = self.epoch + 1, 0, True
            self.rows = self.data.examples_of_rows(self.epoch)
            return
        self._pack(examples, self.epoch, self.row)
        self.is_empty = self.is_empty and not examples
        self.row += 1

    def _pack(self, examples: list[Example], epoch: int, row: int) -> None:
        if isinstance(examples, LeftOut):
            self.left_out.append(examples)
        for number, example in enumerate(examples):
            self.ready.extend(self.packer.add(replace(example, place=(epoch, row, number))))

    def take_left_out(self) -> list[LeftOut]:
        """The rows that were left out since the last call."""
        taken, self.left_out = self.left_out, []
        return taken

    def position(self) -> Position:
        def places(sequences):
            return [[list(example.place) for example in members] for members in sequences]

        return Position(self.epoch, self.row, places(self.packer.open), places(self.ready))


class TrainStream(IterableDataset):
    """Yields, endlessly and for every optimizer step, this rank's `sequences_per_rank` packed sequences.

    A step takes the next `world_size * sequences_per_rank` sequences of the global order; rank r takes the r-th
    contiguous part. A step may span epochs, so nothing is dropped at the end of an epoch. Every rank iterates over the
    complete order, and the sequences of a step are the same for any number of ranks.

    Args:
        start: the position of an earlier stream, from `StepData.position`; default: the beginning.

    Raises (while iterating):
        LRSAError: an epoch has no sequence.
    """

    def __init__(
        self,
        data: TrainingRows,
        sequences_per_rank: int,
        rank: int,
        world_size: int,
        start: dict | None = None,
    ):
        super().__init__()
        self.data = data
        self.sequences_per_rank = sequences_per_rank
        self.rank = rank
        self.world_size = world_size
        self.start = Position(**(start or {}))

    def __iter__(self) -> Iterator[StepData]:
        order = SequenceOrder(self.data, self.start)
        first = self.rank * self.sequences_per_rank
        while True:
            step = [order.next() for _ in range(self.world_size * self.sequences_per_rank)]
            mine = step[first : first + self.sequences_per_rank]
            examples = [example for members in step for example in members]
            yield StepData(
                sequences=[packed(members, self.data.seq_len, self.data.pad_id) for members in mine],
                position=asdict(order.position()),
                left_out=order.take_left_out(),
                num_cut_tokens=sum(example.num_cut for example in examples),
                num_lost_answers=sum(example.answer_lost for example in examples),
            )


def make_loader(stream: TrainStream, num_workers: int) -> Iterable[StepData]:
    """A loader of the stream's steps, unbatched: in this process (0), or ahead of time in another one (1).

    An LRSAError raised in the worker is raised here unchanged, without the traceback of the worker.
    """
    dataset = stream if num_workers == 0 else _ErrorsAsItems(stream)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=num_workers, collate_fn=_unchanged, worker_init_fn=_start_worker
    )
    return _Steps(loader)


class _ErrorsAsItems(IterableDataset):
    """The stream, which yields an `LRSAError` as its last item: torch would wrap it in a traceback."""

    def __init__(self, stream: TrainStream):
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.stream
        except LRSAError as error:
            yield error


class _Steps:
    """The items of a loader; an error among them is raised."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[StepData]:
        for item in self.loader:
            if isinstance(item, LRSAError):
                raise item
            yield item


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker_id: int) -> None:
    # Whoever stops a run signals all of its processes; the run still needs data for the rest of its step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A forked tokenizer disables its threads anyway, but prints a warning about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Another thread may have held the lock of remote streaming at the fork; `datasets` also resets it in its workers.
    fsspec.asyn.reset_lock()
