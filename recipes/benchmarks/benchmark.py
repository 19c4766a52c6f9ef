"""The interface of a published benchmark: its rows as cases, each with the prompt, limits and metric of its authors.

To add one: a file with a `Benchmark`, a line in the table of `recipes/benchmarks/__init__.py`, and its key, which holds
the path of the user's copy, in `lrsa_ds/evaluate/config.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrsa_ds.errors import LRSAError

# From the output, the right answers, and the labels of the task, to a score from 0 to 1.
Metric = Callable[[str, Sequence[str], Sequence[str]], float]


@dataclass(frozen=True)
class Case:
    """One question of a benchmark.

    Args:
        task: its name below that of the benchmark.
        prompt: the complete text of the user.
        answers: right answers; their meaning depends on the metric.
        expected: the complete right answer, for measurements at its tokens.
        max_new_tokens: the authors' limit of an answer.
        answer_prefix: the beginning of the answer, which is part of the prompt.
        length: number of tokens that the prompt was made for, if its folder names it.
        in_turn: False for prompts outside the chat template.
        may_be_cut: whether the middle of a prompt that is too long is removed.
        classes: the labels of a classification.
        stop: a text whose last token ends the answer.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    expected: str
    metric: str
    max_new_tokens: int
    answer_prefix: str = ""
    length: int | None = None
    in_turn: bool = True
    may_be_cut: bool = False
    classes: tuple[str, ...] = ()
    stop: str = ""


@dataclass(frozen=True)
class Benchmark:
    """How the user's copy of a benchmark is read, and how its answers are scored.

    Args:
        read: from the path of the copy to its cases; raises LRSAError for rows of another form.
        metrics: by name.
    """

    read: Callable[[str], Iterator[Case]]
    metrics: Mapping[str, Metric]


def text_of(row: dict[str, Any], key: str, place: str) -> str:
    if not isinstance(row.get(key), str):
        raise LRSAError(f"{place}: {key} is missing or not text.")
    return row[key]


def texts_of(row: dict[str, Any], key: str, place: str, may_be_empty: bool = False) -> tuple[str, ...]:
    """A list of at least one text; `may_be_empty` is about the texts."""
    texts = row.get(key)
    are_texts = isinstance(texts, list) and all(isinstance(text, str) and (text or may_be_empty) for text in texts)
    if not texts or not are_texts:
        raise LRSAError(f"{place}: {key} has to be a list of texts, and not an empty one.")
    return tuple(texts)


def whole_number_of(row: dict[str, Any], key: str, place: str, at_least: int | None = None) -> int:
    number = row.get(key)
    is_whole = isinstance(number, int) and not isinstance(number, bool)
    if not is_whole or (at_least is not None and number < at_least):
        least = "" if at_least is None else f" of at least {at_least}"
        raise LRSAError(f"{place}: {key} is missing or not a whole number{least}.")
    return number
