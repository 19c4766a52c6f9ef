"""Questions over long documents: conversion of rows to tokens and labels.

The loss is on the output of the assistant (the answer, the completion, the assistant's messages) and on the token that
ends its turn; in plain text, on every token.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.cutting import TooLong
from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.opening import rows_of
from lrsa_ds.data.packing import Example, LeftOut
from lrsa_ds.data.rows import Row
from lrsa_ds.data.shapes import ToRow, uncut_length
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError

# Upper bound for the tokens of a chat template itself.
FRAME_TOKENS = 1024


def prepare(config: TrainConfig, tokenizer: Tokenizer, to_row: ToRow | None = None) -> "QAData":
    """The data of a run, read and checked as far as possible before training; needs no process group.

    Args:
        to_row: converts a row, as the file or the data set holds it, to one of the known shapes.

    Raises:
        LRSAError: there is nothing to read, a row cannot be used, or `seq_len` is too short for it.
    """
    data = QAData(config, tokenizer, to_row)
    data.check()
    return data


def encode(row: dict[str, Any], tokenizer: Tokenizer, seq_len: int, chat_template: bool = True) -> list[Example]:
    """One row (see `lrsa_ds.data.shapes`) as examples of at most `seq_len` tokens; index 0.

    A `text` row is split into consecutive pieces. A conversation has one more example for every turn that is rendered
    differently in generation than in the history. A row that is too long loses tokens from the middle of the context,
    or of the longest message or prompt; never from the question or the answer.

    Raises:
        LRSAError: the row has no known shape, the chat template refuses it, or it is too long even without its context.
    """
    return Encoder(tokenizer, seq_len, chat_template).examples(row)


class QAData:
    """Training sequences and validation examples of `config.data`; picklable, the same on every rank.

    Attributes:
        pad_id: the token of padding.
        num_rows: training rows of an epoch; None if unknown.
        num_bad_rows: how many of them are known to be unusable.
        num_too_long_rows: rows left out of all contexts because they fit none.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, to_row: ToRow | None = None):
        data = config.data
        self.seq_len = config.seq_len
        self.pad_id: int = tokenizer.pad_token_id
        self.encoder = Encoder(tokenizer, config.seq_len, data.chat_template, data.too_long == "cut")
        self.on_bad_row, self.too_long = data.on_bad_row, data.too_long
        self.rows = rows_of(config, tokenizer, self.encoder, to_row)

    @property
    def num_rows(self) -> int | None:
        return self.rows.num_trained

    @property
    def num_bad_rows(self) -> int:
        return self.rows.num_bad

    @property
    def num_too_long_rows(self) -> int:
        return self.rows.num_too_long

    def row_order(self, epoch: int) -> Iterable[int] | None:
        """The numbers of the rows in the order of the epoch, if every epoch has the same rows."""
        order = self.rows.order(epoch)
        return None if order is None else order.tolist()

    def examples_of_rows(self, epoch: int, first: int = 0) -> Iterator[list[Example]]:
        """The examples of every training row, in the order of the epoch, from row `first` on; the same on all ranks."""
        for row in self.rows.epoch(epoch, first):
            yield self._examples(row)

    def examples_at(self, epoch: int, rows: list[int]) -> dict[int, list[Example]]:
        """The examples of the rows at these places in the order of the epoch."""
        return {place: self._examples(row) for place, row in self.rows.at(epoch, rows).items()}

    def _examples(self, row: Row) -> list[Example]:
        """The examples of a row; a row that is left out has none, and a reason."""
        try:
            if isinstance(row.content, LRSAError):
                raise row.content
            if not isinstance(row.content, dict):  # as it is made, with a number of its own
                return [replace(example, index=row.index) for example in row.content()]
            return self.encoder.examples(row.content, row.index, row.place)
        except TooLong as error:
            if self.too_long == "drop":
                return LeftOut(str(error), is_too_long=True)
            return self._bad(error)
        except LRSAError as error:
            return self._bad(error)

    def _bad(self, error: LRSAError) -> LeftOut:
        if self.on_bad_row == "error":
            raise error
        return LeftOut(str(error))

    def fingerprint(self) -> str:
        """Identifies the training rows, so that a resumed run notices changes."""
        return self.rows.fingerprint()

    def validation_examples(self) -> list[Example]:
        """The examples for scoring: `eval.num_examples` rows or questions, or that many contexts of each task."""
        return [example for row in self.rows.validation() for example in self._examples(row)]

    def check(self) -> None:
        """Encodes the validation rows of the data, the rows most likely too long, and the first training row."""
        # Generated contexts fit, and take time to generate.
        num_usable = sum(1 if callable(row.content) else len(self._examples(row)) for row in self.rows.validation())
        if num_usable == 0:
            raise LRSAError("no validation row can be used: see data.on_bad_row, data.too_long and seq_len.")
        for row in self.rows.longest():
            if isinstance(row.content, dict) and 4 * uncut_length(row.content) + FRAME_TOKENS <= self.seq_len:
                break  # a character has at most four bytes, and a byte is at most one token
            self._examples(row)
        next(self.examples_of_rows(0), None)
