"""Cuts: their length, what they spare, and rows of tokens."""

import pytest

from lrsa_ds.data.cutting import is_spared, kept_parts
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.data.tokenized import tokenized_examples
from lrsa_ds.errors import LRSAError


def test_both_ends_stay():
    assert kept_parts(10, 10) == [range(10)]
    assert kept_parts(10, 5) == [range(3), range(8, 10)]
    assert kept_parts(10, 1) == [range(1)]
    assert kept_parts(10, 0) == []


@pytest.mark.parametrize("num_tokens,room", [(60, 59), (60, 31), (60, 12), (60, 5), (60, 1)])
def test_the_place_of_the_answer_is_spared_wherever_it_stands(num_tokens, room):
    for start in range(num_tokens):
        for stop in range(start + 1, min(start + room, num_tokens) + 1):
            parts = kept_parts(num_tokens, room, [range(start, stop)])
            places = [i for part in parts for i in part]
            assert len(places) == room and places == sorted(set(places)) and 0 <= places[0] <= places[-1] < num_tokens
            assert is_spared(parts, range(start, stop))


def test_a_place_longer_than_the_room_is_cut():
    assert kept_parts(60, 6, [range(20, 40)]) == [range(3), range(57, 60)]


def test_several_places_are_spared():
    places = [range(10, 13), range(30, 34), range(50, 51)]
    for room in (8, 9, 20, 40, 59):
        parts = kept_parts(60, room, places)
        assert sum(map(len, parts)) == room and all(is_spared(parts, place) for place in places)
    parts = kept_parts(60, 5, places)  # the first and the last fit
    assert [is_spared(parts, place) for place in places] == [True, False, True]


def test_rows_of_tokens():
    def examples(ids, labels, seq_len):
        row = {"input_ids": ids, "labels": labels, "task": "tokens"}
        return tokenized_examples(row, 4, seq_len, num_tokens=100)

    ids = list(range(10, 30))
    (whole,) = examples(ids, [*[IGNORE] * 15, *ids[15:]], 20)
    assert whole.input_ids == ids and whole.labels == [*[IGNORE] * 15, *ids[15:]] and whole.index == 4
    (cut,) = examples(ids, [*[IGNORE] * 15, *ids[15:]], 11)
    assert cut.input_ids == [10, 11, 12, 22, 23, 24, *ids[15:]] and cut.labels == [*[IGNORE] * 6, *ids[15:]]
    assert (whole.num_cut, cut.num_cut) == (0, 9)
    pieces = examples(ids, ids, 8)
    assert [p.input_ids for p in pieces] == [ids[:8], ids[8:16], ids[16:]]
    assert [p.labels for p in pieces] == [[IGNORE, *p.input_ids[1:]] for p in pieces]
    with pytest.raises(LRSAError, match=r"still has 18 tokens, more than seq_len=8"):
        examples(ids, [ids[0], IGNORE, IGNORE, *ids[3:]], 8)
    with pytest.raises(LRSAError, match=r"has the token 100, and the tokenizer only those below 100"):
        examples([5, 100], [5, 100], 8)
