"""The endless stream of training steps, the same for any number of ranks."""

import os
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import fsspec.asyn
from torch.utils.data import DataLoader, IterableDataset

from lrsa_ds.data.packing import PackedSequence
from lrsa_ds.errors import LRSAError


class TrainStream(IterableDataset):
    """Yields, for every optimizer step and for ever, this rank's list of `sequences_per_rank` packed sequences.

    The global order is that of epochs 0, 1, 2, ... one after the other. A step takes the next
    `world_size * sequences_per_rank` sequences of it, rank r the r-th contiguous part. A step may span epochs, so
    nothing is dropped at an epoch's end. Every rank walks the whole order: `sequences_of_epoch(epoch)` must give the
    same on each, and the sequences of a step are then the same for any number of ranks.

    Raises (while iterating):
        LRSAError: an epoch without a single sequence.
    """

    def __init__(
        self,
        sequences_of_epoch: Callable[[int], Iterator[PackedSequence]],
        sequences_per_rank: int,
        rank: int,
        world_size: int,
    ):
        super().__init__()
        self.sequences_of_epoch = sequences_of_epoch
        self.sequences_per_rank = sequences_per_rank
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[PackedSequence]]:
        order = self._global_order()
        first = self.rank * self.sequences_per_rank
        while True:
            step = list(islice(order, self.world_size * self.sequences_per_rank))
            yield step[first : first + self.sequences_per_rank]

    def _global_order(self) -> Iterator[PackedSequence]:
        for epoch in count():
            empty = True
            for sequence in self.sequences_of_epoch(epoch):
                empty = False
                yield sequence
            if empty:
                raise LRSAError(f"The training data has no example in epoch {epoch}: check data.path or data.name.")


def make_loader(stream: TrainStream, num_workers: int) -> DataLoader:
    """A loader of the stream's steps, unbatched, in this process (0) or prepared ahead in another one (1).

    A user error met in the worker arrives here as it was raised, not wrapped into the worker's traceback.
    """
    dataset = stream if num_workers == 0 else _ErrorsAsItems(stream)
    return _Loader(
        dataset, batch_size=None, num_workers=num_workers, collate_fn=_unchanged, worker_init_fn=_start_worker
    )


class _ErrorsAsItems(IterableDataset):
    """The stream, with a final `LRSAError` as an item: torch would bury its sentence in a traceback."""

    def __init__(self, stream: TrainStream):
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.stream
        except LRSAError as error:
            yield error


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[list[PackedSequence]]:
        for item in super().__iter__():
            if isinstance(item, LRSAError):
                raise item
            yield item


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker_id: int) -> None:
    # A forked tokenizer switches its threads off by itself, but prints a warning about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The lock of remote streaming may have been held elsewhere at the fork; `datasets` does this for its own workers.
    fsspec.asyn.reset_lock()
