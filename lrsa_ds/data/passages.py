"""Passages with the questions about them, grouped from rows of questions, and split by article."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from lrsa_ds.data.contexts import Asked
from lrsa_ds.data.material import Split, all_rows, say_left_out, validation_rows
from lrsa_ds.data.shapes import ToRow
from lrsa_ds.data.sources import ROWS_TO_ONE, Rows
from lrsa_ds.errors import LRSAError
from lrsa_ds.notices import say_once
from lrsa_ds.settings.data import DataConfig


@dataclass(slots=True)
class Passage:
    """A context of the data, without repetition, with all questions about it.

    `article` is the `title` of its rows, or the passage itself if they have none.
    """

    text: str
    article: str
    asked: list[Asked] = field(default_factory=list)


def open_passages(
    data: DataConfig, seed: int, num_validation: int, to_row: ToRow | None = None, allow_fewer: bool = False
) -> Split[Passage]:
    """The passages of `data.path` or `data.name`.

    Those of `data.validation_path` or `data.validation_split` are held out. If neither is set, complete articles are
    held out, in an order that `seed` gives, until they have `num_validation` questions.

    Args:
        allow_fewer: whether, if there are few questions, holding out a quarter of them is enough.

    Raises:
        LRSAError: as `Rows`; rows have no question; or there are too few articles to hold one out.
    """
    rows = all_rows(data, seed, to_row, needs="question")
    label, content = rows.source.opened.label, rows.fingerprint()
    passages = _grouped(rows, label)
    separate = validation_rows(data, seed, to_row, needs="question")
    if separate is None:
        held_out = _held_out(passages, seed, num_validation, label, allow_fewer)
        content += f", {len(held_out)} passages held out"
    else:
        held_out = _grouped(separate, separate.source.opened.label)
        content += f", without those of {separate.fingerprint()}"
    texts = {passage.text for passage in held_out}
    train = [passage for passage in passages if passage.text not in texts]
    if not train:
        raise LRSAError(f"{label}: all passages are held out; leave some of other articles to train on.")
    return Split(train, held_out, label, content, rows.num_bad)


def _grouped(rows: Rows, label: str) -> list[Passage]:
    """Groups rows with the same context into passages, in order of first occurrence."""
    say_left_out(rows)
    passages: dict[str, Passage] = {}
    absent: list[str] = []
    for row in rows.source.good_rows():
        content = cast(dict[str, Any], row.content)
        text = content["context"].strip()
        if not text:
            raise LRSAError(f"{row.place}: context is empty, and data.make_contexts makes contexts of passages.")
        passage = passages.setdefault(text, Passage(text, content.get("title") or text))
        standing = [a for a in content.get("answers", [content["answer"]]) if a in text]
        if not standing:
            absent.append(str(row.place))
        answer = next(iter(standing), content["answer"])
        passage.asked.append(Asked(content["question"].strip(), answer.strip(), content["task"]))
    if absent:
        total = sum(len(passage.asked) for passage in passages.values())
        say_once(
            f"{label}: {len(absent):,} of {total:,} answers do not stand in their context, first that of {absent[0]}; "
            "they are asked all the same."
        )
    return list(passages.values())


def _held_out(passages: list[Passage], seed: int, count: int, label: str, allow_fewer: bool) -> list[Passage]:
    """The passages of random articles that together have at least `count` questions."""
    sizes: dict[str, int] = {}
    for passage in passages:
        sizes[passage.article] = sizes.get(passage.article, 0) + len(passage.asked)
    total = sum(sizes.values())
    if allow_fewer and count > total // ROWS_TO_ONE:
        count = max(1, total // ROWS_TO_ONE)
        say_once(f"eval.num_examples is a default, and {label} has {total} questions: at least {count} are held out.")
    chosen = set(_until(sizes, count, np.random.default_rng([seed, 0])))
    if len(chosen) == len(sizes):
        raise LRSAError(
            f"eval.num_examples={count} questions cannot be held out of the {total} over {len(sizes)} articles of "
            f"{label}: lower eval.num_examples, add articles, or give validation data of their own."
        )
    return [passage for passage in passages if passage.article in chosen]


def _until(sizes: dict[str, int], count: int, random: np.random.Generator) -> Iterator[str]:
    names = list(sizes)
    for i in random.permutation(len(names)):
        if count <= 0:
            return
        yield names[i]
        count -= sizes[names[i]]
