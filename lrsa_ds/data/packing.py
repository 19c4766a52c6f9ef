"""Packing of examples into sequences of one fixed length.

An `Example` is one tokenized document with unshifted labels. A `PackedSequence` holds several of them, with labels
already shifted, so that a shard needs no token of the next one. T is the length of a sequence.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lrsa_ds.errors import LRSAError

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One document.

    `labels[i] == input_ids[i]` if token i is a target, else `IGNORE`. Token 0 is never a target: it cannot be
    predicted. `task` is the kind of question, `index` the number of the row or example in its source. `place` is its
    place in a training stream: epoch, row in the order of the epoch, and number within the row. `num_cut` tokens were
    removed to make it fit; `answer_lost` tells whether the answer in the context was among them.
    """

    input_ids: Sequence[int]
    labels: list[int]
    task: str
    index: int
    place: tuple[int, int, int] | None = None
    num_cut: int = 0
    answer_lost: bool = False


class LeftOut(list[Example]):
    """The examples of a row that is left out: none, with the reason, a sentence that names the row.

    `is_too_long` marks a row that is only too long, and that `data.too_long=drop` leaves out.
    """

    def __init__(self, reason: str, is_too_long: bool = False):
        super().__init__()
        self.reason = reason
        self.is_too_long = is_too_long


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Several documents in T tokens; all tensors are int64 of shape [T].

    `labels[t]` is token t+1, the target of position t, or `IGNORE`; never a token of another document. `position_ids`
    restart at 0 in every document. `document_lengths` sum to T: padding at the end is a document of its own, the last,
    with task None and index -1. `num_tokens` counts the tokens without padding, `num_target_tokens` the labels that are
    not `IGNORE`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_lengths: tuple[int, ...]
    tasks: tuple[str | None, ...]
    example_indices: tuple[int, ...]
    num_tokens: int
    num_target_tokens: int

    def is_token(self) -> torch.Tensor:
        """Bool, False for padding, of the complete row that `document_lengths` describe."""
        is_example = torch.tensor(self.example_indices) >= 0
        return is_example.repeat_interleave(torch.tensor(self.document_lengths))


class Packer:
    """First-fit packing of examples into sequences of `seq_len` tokens; every example goes into exactly one of them.

    At most `num_open` sequences are open at a time: when an example fits none of them, the fullest one is closed.
    The result depends on the order of the examples only.
    """

    def __init__(self, seq_len: int, num_open: int = 8):
        self.seq_len = seq_len
        self.num_open = num_open
        self.restore([])

    def restore(self, sequences: list[list[Example]]) -> None:
        """Continues with the open sequences of an earlier packer, given by their members in order."""
        self.open = sequences
        self._room = [self.seq_len - sum(len(example.input_ids) for example in members) for members in sequences]

    def add(self, example: Example) -> list[list[Example]]:
        """Adds an example to a sequence, and returns the members of the sequences that are closed now.

        Raises:
            LRSAError: the example is longer than `seq_len`.
        """
        length, closed = len(example.input_ids), []
        if length > self.seq_len:
            raise LRSAError(f"seq_len={self.seq_len} is too short for example {example.index} of {length} tokens.")
        place = next((i for i, room in enumerate(self._room) if room >= length), None)
        if place is None:
            if len(self.open) == self.num_open:
                closed.append(self._close(self._room.index(min(self._room))))
            place = len(self.open)
            self.open.append([])
            self._room.append(self.seq_len)
        self.open[place].append(example)
        self._room[place] -= length
        if self._room[place] == 0:
            closed.append(self._close(place))
        return closed

    def _close(self, place: int) -> list[Example]:
        del self._room[place]
        return self.open.pop(place)

    def flush(self) -> list[list[Example]]:
        """Closes all open sequences and returns their members."""
        closed = self.open
        self.restore([])
        return closed


def pack(examples: Iterable[Example], seq_len: int, pad_id: int, num_open: int = 8) -> Iterator[PackedSequence]:
    """Packs all examples; see `Packer`."""
    packer = Packer(seq_len, num_open)
    for example in examples:
        for members in packer.add(example):
            yield packed(members, seq_len, pad_id)
    for members in packer.flush():
        yield packed(members, seq_len, pad_id)


def collate(sequences: list[PackedSequence], multiple_of: int = 1) -> PackedSequence:
    """One row of `len(sequences) * T` tokens: the tensors and the lists of documents are concatenated.

    The row is padded to a multiple of `multiple_of` tokens, so that this many ranks can share it.
    """
    missing = -sum(len(s.input_ids) for s in sequences) % multiple_of
    if missing:
        # Any token serves: padding is a document of its own, and nothing in it is a target.
        sequences = [*sequences, padding_sequence(missing, pad_id=0)]
    return PackedSequence(
        input_ids=torch.cat([s.input_ids for s in sequences]),
        labels=torch.cat([s.labels for s in sequences]),
        position_ids=torch.cat([s.position_ids for s in sequences]),
        document_lengths=sum((s.document_lengths for s in sequences), ()),
        tasks=sum((s.tasks for s in sequences), ()),
        example_indices=sum((s.example_indices for s in sequences), ()),
        num_tokens=sum(s.num_tokens for s in sequences),
        num_target_tokens=sum(s.num_target_tokens for s in sequences),
    )


def shard(row: PackedSequence, parts: tuple[slice, ...], is_first: bool) -> PackedSequence:
    """The tokens `parts` of a row, concatenated: the shard of one of the ranks that share the row.

    The lists of documents stay those of the complete row. `num_target_tokens` counts the shard's targets. `num_tokens`
    is that of the row on the first rank and 0 on the others: summed over the ranks, both count everything once.
    """
    input_ids, labels, position_ids = (
        torch.cat([x[part] for part in parts]) for x in (row.input_ids, row.labels, row.position_ids)
    )
    return replace(
        row,
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        num_tokens=row.num_tokens if is_first else 0,
        num_target_tokens=int((labels != IGNORE).sum()),
    )


def padding_sequence(seq_len: int, pad_id: int) -> PackedSequence:
    """A sequence of padding without targets: it gives all ranks the same number of sequences."""
    return packed([], seq_len, pad_id)


def packed(examples: list[Example], seq_len: int, pad_id: int) -> PackedSequence:
    """Packs the given examples and padding into one sequence."""
    lengths = [len(e.input_ids) for e in examples]
    tasks: list[str | None] = [e.task for e in examples]
    indices = [e.index for e in examples]
    num_tokens = sum(lengths)
    tail = seq_len - num_tokens
    input_ids = [token for e in examples for token in e.input_ids] + [pad_id] * tail
    labels = [label for e in examples for label in (*e.labels[1:], IGNORE)] + [IGNORE] * tail
    if tail:
        lengths.append(tail)
        tasks.append(None)
        indices.append(-1)
    return PackedSequence(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        document_lengths=tuple(lengths),
        tasks=tuple(tasks),
        example_indices=tuple(indices),
        num_tokens=num_tokens,
        num_target_tokens=sum(label != IGNORE for label in labels),
    )
