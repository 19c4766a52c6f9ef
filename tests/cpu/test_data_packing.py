"""Packing and the stream of steps: shifted labels, document borders, and one order for any number of ranks."""

import json
import pickle
from collections import Counter
from itertools import islice

import pytest
import torch

from lrsa_ds.data.packing import IGNORE, Example, LeftOut, collate, pack, packed, padding_sequence
from lrsa_ds.data.stream import Position, SequenceOrder, TrainStream, make_loader, reread
from lrsa_ds.errors import LRSAError

PAD = 0


def make_examples(lengths, epoch=0):
    """Example i has tokens 1000*(i+1), 1000*(i+1)+1, ...; its second half is to be predicted."""
    examples = []
    for i, length in enumerate(lengths):
        ids = [1000 * (i + 1) + 100_000 * epoch + t for t in range(length)]
        half = max(length // 2, 1)
        examples.append(Example(ids, [IGNORE] * half + ids[half:], "ab"[i % 2], i))
    return examples


LENGTHS = [5, 40, 17, 64, 3, 31, 33, 20, 9, 1, 63, 12, 12, 12, 40, 24]


class Rows:
    """Training data of given lengths; rows of several examples, and one of none, as plain text gives them."""

    seq_len, pad_id = 64, PAD

    def __init__(self, lengths):
        self.lengths = lengths

    def examples_of_rows(self, epoch, first=0):
        examples = make_examples(self.lengths, epoch)
        taken, groups = 0, []
        for size in [1, 2, 0, 3] * len(examples):
            groups.append(examples[taken : taken + size])
            taken += size
            if taken >= len(examples):
                break
        yield from groups[first:]

    def examples_at(self, epoch, rows):
        return {row: next(Rows.examples_of_rows(self, epoch, row)) for row in rows}


def sequences_of_epoch(lengths, epoch):
    return pack(make_examples(lengths, epoch), 64, PAD)


def test_labels_are_the_next_token_of_the_same_document():
    examples = {e.index: e for e in make_examples(LENGTHS)}
    for sequence in pack(examples.values(), 64, PAD):
        assert sum(sequence.document_lengths) == 64
        start, targets, tokens = 0, 0, 0
        for length, task, index in zip(
            sequence.document_lengths, sequence.tasks, sequence.example_indices, strict=True
        ):
            for i in range(length):
                t = start + i
                assert sequence.position_ids[t] == i
                if index == -1:
                    assert task is None and sequence.input_ids[t] == PAD and sequence.labels[t] == IGNORE
                    continue
                example = examples[index]
                assert task == example.task and sequence.input_ids[t] == example.input_ids[i]
                # Position t predicts token i+1 where that is a target; the last of a document predicts nothing.
                expected = example.labels[i + 1] if i + 1 < length else IGNORE
                assert sequence.labels[t] == expected
                targets += expected != IGNORE
                tokens += 1
            start += length
        assert (sequence.num_target_tokens, sequence.num_tokens) == (targets, tokens)


@pytest.mark.parametrize("num_open", [1, 2, 8])
def test_every_example_lands_in_exactly_one_sequence(num_open):
    sequences = list(pack(make_examples(LENGTHS), 64, PAD, num_open))
    indices = Counter(i for s in sequences for i in s.example_indices if i >= 0)
    assert indices == Counter(range(len(LENGTHS)))
    again = list(pack(make_examples(LENGTHS), 64, PAD, num_open))
    assert [s.example_indices for s in sequences] == [s.example_indices for s in again]


def test_an_example_longer_than_a_sequence_is_an_error():
    with pytest.raises(LRSAError, match="seq_len=64 is too short for example 0 of 65 tokens"):
        list(pack(make_examples([65]), 64, PAD))


def test_collate_and_padding():
    full, padded = next(sequences_of_epoch([40, 24], 0)), padding_sequence(64, PAD)
    assert padded.document_lengths == (64,) and padded.tasks == (None,) and padded.example_indices == (-1,)
    assert padded.num_tokens == padded.num_target_tokens == 0 and (padded.labels == IGNORE).all()
    row = collate([full, padded])
    assert row.input_ids.shape == row.labels.shape == row.position_ids.shape == (128,)
    assert row.document_lengths == (40, 24, 64) and row.tasks == ("a", "b", None)
    assert row.num_tokens == 64 and row.num_target_tokens == 32
    assert torch.equal(row.labels[:64], full.labels)


def steps(num_steps, sequences_per_rank, rank, world_size, num_workers=0):
    stream = TrainStream(Rows(LENGTHS), sequences_per_rank, rank, world_size)
    return [step.sequences for step in islice(make_loader(stream, num_workers), num_steps)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_same_order_for_every_world_size(world_size):
    ranks = [steps(6, 4 // world_size, rank, world_size) for rank in range(world_size)]
    together = [s for step in zip(*ranks, strict=True) for part in step for s in part]
    epochs = (s for epoch in range(9) for s in sequences_of_epoch(LENGTHS, epoch))
    for ours, expected in zip(together, islice(epochs, 24), strict=True):
        assert torch.equal(ours.input_ids, expected.input_ids)
    per_epoch = len(list(sequences_of_epoch(LENGTHS, 0)))
    seen = Counter(i for s in together[:per_epoch] for i in s.example_indices if i >= 0)
    assert seen == Counter(range(len(LENGTHS))), "an epoch has every example once"


def test_a_worker_gives_the_same_stream():
    for here, there in zip(steps(5, 2, 1, 2), steps(5, 2, 1, 2, num_workers=1), strict=True):
        assert len(here) == len(there) == 2
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert (a.document_lengths, a.tasks, a.num_tokens) == (b.document_lengths, b.tasks, b.num_tokens)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_empty_epoch_is_one_sentence(num_workers):
    loader = make_loader(TrainStream(Rows([]), 1, 0, 1), num_workers)
    with pytest.raises(LRSAError) as caught:
        next(iter(loader))
    assert str(caught.value) == "The training data has no example in epoch 0: check data.path or data.name."


def test_stream_is_picklable():
    stream = pickle.loads(pickle.dumps(TrainStream(Rows(LENGTHS), 1, 0, 1)))
    assert next(iter(stream)).sequences[0].num_tokens > 0


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_done", range(9))
def test_a_stream_goes_on_from_any_step_at_any_world_size(num_done, num_workers):
    """Nothing is skipped, repeated or packed otherwise; the position goes through JSON."""
    expected = [s for step in steps(12, 4, 0, 1) for s in step]
    before = list(islice(iter(TrainStream(Rows(LENGTHS), 4, 0, 1)), num_done))
    position = json.loads(json.dumps(before[-1].position)) if before else None
    for world_size in (1, 2):
        ranks = []
        for rank in range(world_size):
            stream = TrainStream(Rows(LENGTHS), 4 // world_size, rank, world_size, position)
            ranks.append(list(islice(make_loader(stream, num_workers), 12 - num_done)))
        after = [s for step in zip(*ranks, strict=True) for part in step for s in part.sequences]
        for ours, theirs in zip(after, expected[4 * num_done :], strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids) and ours.example_indices == theirs.example_indices


def test_over_changed_data_every_row_is_read_once_more_or_for_the_first_time():
    """What was packed and not taken is packed anew, in sequences of another length and without rows that are gone."""
    lengths = LENGTHS * 3

    class Longer(Rows):
        seq_len = 80

        def examples_at(self, epoch, rows):
            return super().examples_at(epoch, [row for row in rows if row != gone])

    for num_done in range(1, 5):
        done = list(islice(iter(TrainStream(Rows(lengths), 1, 0, 1)), num_done))
        position = json.loads(json.dumps(done[-1].position))
        assert position["epoch"] == 0
        gone = min((row for places in position["open"] for _, row, _ in places), default=None)
        order = SequenceOrder(Longer(lengths), Position(**reread(position)))
        taken = []
        while order.epoch == 0 or order.ready:
            taken.append(packed(order.next(), 80, PAD))
        seen = Counter(i for step in done for s in step.sequences for i in s.example_indices if i >= 0)
        again = Counter(i for sequence in taken for i in sequence.example_indices if i >= 0)
        groups = [[e.index for e in row] for row in Rows(lengths).examples_of_rows(0)]
        for number, group in enumerate(groups):
            if number == gone:
                continue
            # A row of several examples may have been taken in part: then it is read again as a whole.
            assert all(again[i] == 1 for i in group) or all(seen[i] == 1 and again[i] == 0 for i in group)


def test_a_row_that_is_left_out_is_told_once():
    class Some(Rows):
        def examples_of_rows(self, epoch, first=0):
            for number, examples in enumerate(super().examples_of_rows(epoch, first), start=first):
                yield LeftOut(f"row {number}") if number in (1, 5) else examples

    steps = list(islice(iter(TrainStream(Some(LENGTHS), 2, 1, 2)), 4))
    told = [row.reason for step in steps for row in step.left_out]
    num_epochs = steps[-1].position["epoch"] + 1
    assert num_epochs > 1 and told[:4] == ["row 1", "row 5"] * 2
    position = json.loads(json.dumps(steps[1].position))
    for ours, theirs in zip(TrainStream(Some(LENGTHS), 2, 1, 2, position), steps[2:]):
        assert [row.reason for row in ours.left_out] == [row.reason for row in theirs.left_out]
        assert ours.position == theirs.position


def test_going_on_reads_no_row_before_its_place():
    read = []

    class Counted(Rows):
        def examples_of_rows(self, epoch, first=0):
            for number, row in enumerate(super().examples_of_rows(epoch, first), start=first):
                read.append((epoch, number))
                yield row

    position = list(islice(iter(TrainStream(Rows(LENGTHS), 2, 0, 1)), 7))[-1].position
    next(iter(TrainStream(Counted(LENGTHS), 2, 0, 1, position)))
    assert min(read) == (position["epoch"], position["row"])
