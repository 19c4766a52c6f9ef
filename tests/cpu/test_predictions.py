"""What the model says beside what is right, under teacher forcing, for any cut of the rows into parts."""

import itertools

import pytest
import torch

from lrsa_ds.data.packing import IGNORE, Example, packed
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.train.predictions import ANSWER_TOKENS, SHOWN_PER_TASK, ShownAnswers, prediction_row
from lrsa_ds.train.scoring import _answers, _num_answers, _targets

TOKENIZER = byte_tokenizer()


def example(index, prompt="What is it? ", answers=("42",), task="qa"):
    """A conversation: the prompt before each of the answers, which are the targets."""
    ids, labels = [], []
    for answer in answers:
        for text, is_target in ((prompt, False), (answer, True)):
            new = TOKENIZER(text, add_special_tokens=False).input_ids
            ids += new
            labels += new if is_target else [IGNORE] * len(new)
    return Example(ids, labels, task, index)


@pytest.mark.parametrize("bounds", [[0, 400], [0, 130, 400], [0, 23, 24, 25, 200, 400]])
def test_the_likeliest_tokens_find_their_example_and_place(bounds):
    """Each part stands for a rank: their sums are what one rank finds."""
    examples = [example(i, answers=("one", "two") if i % 2 else (f"answer {i}",)) for i in range(6)]
    row = packed([examples[i] for i in (3, 0, 1, 5, 2, 4)], 400, 0)
    total, seen = torch.zeros(SHOWN_PER_TASK, ANSWER_TOKENS, dtype=torch.float64), 0
    for lo, hi in itertools.pairwise(bounds):
        shown = ShownAnswers(examples)
        numbers, places = _targets(row, (slice(lo, hi),))
        right = row.labels[lo:hi][row.labels[lo:hi] != IGNORE]
        shown.add(numbers, places, right + 1)
        total, seen = total + shown.tokens_EM, seen + len(right)
    assert seen == row.num_target_tokens
    found = shown.found(total.flatten().tolist())
    assert list(found) == [0, 1, 2]
    for number, tokens in found.items():
        assert tokens == [label + 1 for label in examples[number].labels if label != IGNORE]


def test_a_few_of_each_task_are_shown():
    examples = [example(i, task="qa" if i % 2 else "passkey") for i in range(9)]
    assert ShownAnswers(examples).shown == [0, 1, 2, 3, 4, 5]


def test_the_row_of_a_prediction():
    said = TOKENIZER("41", add_special_tokens=False).input_ids
    row = prediction_row(TOKENIZER, example(0, prompt="long " * 50 + "What is it? "), said)
    assert row["prompt"].endswith("long What is it? ") and len(row["prompt"]) < 60
    assert (row["answer"], row["prediction"]) == ("42", "41")
    whole = prediction_row(TOKENIZER, Example([5, 6, 7], [IGNORE, 6, 7], "text", 0), [6, 7])
    assert whole["prompt"] == TOKENIZER.decode([5]) and whole["answer"] == whole["prediction"]
    long = example(0, answers=("x" * (ANSWER_TOKENS + 40),))
    found = ShownAnswers([long]).found([0.0] * ANSWER_TOKENS)
    assert len(found[0]) == len(prediction_row(TOKENIZER, long, found[0])["answer"]) == ANSWER_TOKENS


def test_answers_of_a_conversation_are_told_apart():
    labels = [[-100, 1, 2, -100, 3], [-100, -100, 4, -100, -100], [-100, 5, -100, 6, -100]]
    examples = [Example(list(range(5)), row, "t", i) for i, row in enumerate(labels)]
    row = packed(examples, 20, 0)
    assert [_num_answers(example) for example in examples] == [2, 1, 2]
    numbers = _answers(row, (slice(0, 20),)).tolist()
    assert numbers == [0, 0, 1, 0, 0, 1]
    assert [n for lo in (0, 7, 14) for n in _answers(row, (slice(lo, min(lo + 7, 20)),)).tolist()] == numbers
