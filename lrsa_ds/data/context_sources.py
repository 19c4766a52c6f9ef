"""The contexts that a configuration asks for, and their examples within `data.context_length` tokens."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.contexts import MARGIN, ContextSource
from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.lengths import TokenCounts
from lrsa_ds.data.packing import Example
from lrsa_ds.data.passage_contexts import PassageContexts
from lrsa_ds.data.passages import open_passages
from lrsa_ds.data.recall import RecallContexts
from lrsa_ds.data.recall_texts import open_texts
from lrsa_ds.data.rows import Row
from lrsa_ds.data.shapes import ToRow
from lrsa_ds.data.stdlib_qa import StdlibQA
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.notices import say_once
from lrsa_ds.settings.data import DataConfig


class SplitContexts(NamedTuple):
    """Generated rows for training and validation, and how many rows of the data were left out.

    `num_bad` rows cannot be used, and `num_too_long` do not fit a context.
    """

    train: ContextSource
    validation: ContextSource
    num_bad: int = 0
    num_too_long: int = 0


class ContextRows:
    """Contexts as rows; the members are those of `RowSource`.

    Every epoch has other contexts, so `order` returns None.
    """

    def __init__(self, contexts: SplitContexts, encoder: Encoder, num_validation: int):
        self.contexts, self.encoder, self.num_validation = contexts, encoder, num_validation
        self.num_bad, self.num_too_long = contexts.num_bad, contexts.num_too_long

    @property
    def num_trained(self) -> int:
        """Contexts of epoch 0; other epochs may have slightly more or fewer."""
        return self.contexts.train.num_contexts(0)

    @property
    def num_all(self) -> int:
        return self.num_trained

    def validation(self) -> list[Row]:
        scored = self.contexts.validation.scored(self.num_validation)
        return [self._row(self.contexts.validation, 0, index, task) for index, task in scored]

    def longest(self) -> list[Row]:
        return []  # generated contexts fit

    def order(self, epoch: int) -> None:
        return None

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Row]:
        for index in range(first, self.contexts.train.num_contexts(epoch)):
            yield self._row(self.contexts.train, epoch, index)

    def at(self, epoch: int, places: list[int]) -> dict[int, Row]:
        count = self.contexts.train.num_contexts(epoch)
        return {place: self._row(self.contexts.train, epoch, place) for place in places if place < count}

    def fingerprint(self) -> str:
        return self.contexts.train.fingerprint()

    def _row(self, source: ContextSource, epoch: int, index: int, task: str | None = None) -> Row:
        make = partial(context_examples, source, self.encoder, epoch, index, task)
        return Row(index, make, f"context {index + 1} of epoch {epoch}")


def open_contexts(
    data: DataConfig,
    config: TrainConfig,
    seed: int,
    num_validation: int,
    tokenizer: Tokenizer,
    encoder: Encoder,
    to_row: ToRow | None = None,
) -> ContextRows:
    """The contexts of `data`, which is `config.data` or one of its sources.

    Raises:
        LRSAError: there are several questions for a context but no chat template; or the source raises it.
    """
    if data.questions_per_context > 1 and not encoder.use_template:
        raise LRSAError(
            f"data.questions_per_context={data.questions_per_context} makes conversations, which need a chat template: "
            "set data.chat_template=true and use a tokenizer that has one, or ask 1 question."
        )
    length, questions = data.context_length or config.seq_len, data.questions_per_context
    counts = TokenCounts(tokenizer)
    if data.source == "stdlib_qa":
        options = (data.tasks, length, tokenizer, encoder.length, data.num_examples, questions)
        contexts = SplitContexts(StdlibQA("train", seed, *options), StdlibQA("validation", seed, *options))
    elif data.source == "recall":
        texts = open_texts(data, seed, to_row)
        options = (seed, length, data.num_examples, questions, counts, encoder.length, texts.label, texts.fingerprint)
        train = RecallContexts(texts.train, (), data.recall_tasks, "train", *options)
        validation = RecallContexts(texts.held_out, texts.train, data.recall_tasks, "validation", *options)
        contexts = SplitContexts(train, validation, texts.num_bad)
    else:
        split = open_passages(data, seed, num_validation, to_row, config.eval.allow_fewer)
        options = (seed, length, questions, counts, encoder.length, split.label, split.fingerprint)
        train = PassageContexts(split.train, (), "train", *options)
        validation = PassageContexts(split.held_out, split.train, "validation", *options)
        contexts = SplitContexts(train, validation, split.num_bad, _without_too_long(train, validation, data.too_long))
    return ContextRows(contexts, encoder, num_validation)


def _without_too_long(train: PassageContexts, validation: PassageContexts, policy: str) -> int:
    """The number of questions that fit no context and are left out as `data.too_long` allows.

    Raises:
        LRSAError: there are some, and they may not be left out.
    """
    too_long = [*train.too_long, *validation.too_long]
    if not too_long:
        return 0
    said = (
        f"{train.label}: {len(too_long):,} questions do not fit with their passages into a context of "
        f"{train.context_length} tokens, first {too_long[0].question[:60]!r}"
    )
    if policy != "drop":
        raise LRSAError(f"{said}: raise data.context_length, or leave them out with data.too_long=drop.")
    say_once(f"{said}; they are left out.")
    return len(too_long)


def context_examples(
    source: ContextSource, encoder: Encoder, epoch: int, index: int, task: str | None = None
) -> list[Example]:
    """The examples of a row, uncut. If they are too long, the row is generated again with a larger margin.

    Raises:
        LRSAError: the questions alone need more than `context_length` tokens.
    """
    margin = MARGIN
    while True:
        row = source.row(epoch, index, task, margin)
        examples = encoder.uncut(row, index)
        excess = max(len(example.input_ids) for example in examples) - source.context_length
        if excess <= 0:
            return examples
        margin += excess
        if margin > source.context_length:
            raise LRSAError(f"seq_len={source.context_length} is too short for a question of task {row['task']}.")
