"""Which contexts a configuration asks for, and their examples within `data.context_length` tokens."""

from typing import NamedTuple

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.contexts import MARGIN, ContextSource
from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.lengths import TokenCounts
from lrsa_ds.data.packing import Example
from lrsa_ds.data.passage_contexts import PassageContexts
from lrsa_ds.data.passages import open_passages
from lrsa_ds.data.shapes import ToRow
from lrsa_ds.data.stdlib_qa import StdlibQA
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.notices import say_once


class Contexts(NamedTuple):
    """Made rows for training and for validation, and the rows of the data that are left out of both.

    `num_bad` rows cannot be used, and `num_too_long` do not fit into a context.
    """

    train: ContextSource
    validation: ContextSource
    num_bad: int = 0
    num_too_long: int = 0


def open_contexts(
    config: TrainConfig, tokenizer: Tokenizer, encoder: Encoder, to_row: ToRow | None = None
) -> Contexts | None:
    """The contexts of `config.data`; None where its rows are trained on as they are.

    Raises:
        LRSAError: several questions over a context without a chat template; or what the source raises.
    """
    data = config.data
    if not data.makes_contexts:
        return None
    if data.questions_per_context > 1 and not encoder.use_template:
        raise LRSAError(
            f"data.questions_per_context={data.questions_per_context} makes conversations, which need a chat template: "
            "set data.chat_template=true and take a tokenizer that has one, or ask 1 question."
        )
    if data.source == "stdlib_qa":
        length = data.context_length or config.seq_len
        options = (data.tasks, length, tokenizer, encoder.length, data.num_examples, data.questions_per_context)
        return Contexts(*(StdlibQA(split, config.seed, *options) for split in ("train", "validation")))
    return _of_passages(config, tokenizer, encoder, to_row)


def _of_passages(config: TrainConfig, tokenizer: Tokenizer, encoder: Encoder, to_row: ToRow | None) -> Contexts:
    data, held = config.data, config.eval
    split = open_passages(data, config.seed, held.num_examples, to_row, held.allow_fewer)
    counts = TokenCounts(tokenizer)
    options = (config.seed, data.context_length, data.questions_per_context, counts, encoder.length)
    train = PassageContexts(split.train, (), "train", *options, split.label, split.fingerprint)
    validation = PassageContexts(split.held_out, split.train, "validation", *options, split.label, split.fingerprint)
    too_long = [*train.too_long, *validation.too_long]
    if too_long:
        said = (
            f"{split.label}: {len(too_long):,} questions do not fit with their passages into "
            f"data.context_length={data.context_length}, first {too_long[0].question[:60]!r}"
        )
        if data.too_long != "drop":
            raise LRSAError(f"{said}: raise data.context_length, or leave them out with data.too_long=drop.")
        say_once(f"{said}; they are left out.")
    return Contexts(train, validation, split.num_bad, len(too_long))


def context_examples(
    source: ContextSource, encoder: Encoder, epoch: int, index: int, task: str | None = None
) -> list[Example]:
    """The examples of a row: uncut, with a little less context where joined texts have more tokens than their parts.

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
