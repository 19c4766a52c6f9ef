"""Questions over long documents: how rows become tokens and labels, and which of them are trained on.

The loss is on what the assistant says (the answer, the completion, the assistant's messages) and on the token that
ends its turn; of plain text, on every token.
"""

from collections.abc import Iterator
from typing import Any

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.packing import IGNORE, Example, LeftOut
from lrsa_ds.data.segments import CUTTABLE, END, FIXED, TARGET, Segment, chat_segments, plain_segments
from lrsa_ds.data.shapes import ToRow, canonical
from lrsa_ds.data.sources import Row, Rows
from lrsa_ds.data.stdlib_docs import documents_fingerprint
from lrsa_ds.data.stdlib_qa import MARGIN, StdlibQA
from lrsa_ds.data.tokenized import tokenized_examples
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError


def prepare(config: TrainConfig, tokenizer: Tokenizer, to_row: ToRow | None = None) -> "QAData":
    """The data of a run, read and checked as far as that is possible before training; needs no process group.

    Args:
        to_row: brings a row, as the file or the data set holds it, into one of the known shapes.

    Raises:
        LRSAError: nothing to read, a row that cannot be used, or a `seq_len` that is too short for it.
    """
    data = QAData(config, tokenizer, to_row)
    data.check()
    return data


def encode(row: dict[str, Any], tokenizer: Tokenizer, seq_len: int, chat_template: bool = True) -> list[Example]:
    """One row (see `lrsa_ds.data.shapes`) as examples of at most `seq_len` tokens; index 0.

    Only a `text` row gives more than one: its consecutive pieces. Of any other row that is too long, tokens are taken
    out of the middle of the context, or of the longest message or prompt; never of the question or the answer.

    Raises:
        LRSAError: a row of no known shape, refused by the chat template, or too long even without its context.
    """
    return Encoder(tokenizer, seq_len, chat_template).examples(row)


class QAData:
    """Training sequences and validation examples of `config.data`; picklable, the same on every rank.

    Attributes:
        pad_id: the token of padding.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, to_row: ToRow | None = None):
        data = config.data
        self.seq_len = config.seq_len
        self.pad_id: int = tokenizer.pad_token_id
        self.encoder = Encoder(tokenizer, config.seq_len, data.chat_template)
        self.num_validation = config.eval.num_examples
        self.on_bad_row = data.on_bad_row
        self.rows: Rows | None = None
        self.generated: dict[str, StdlibQA] = {}
        if data.source == "stdlib_qa":
            self.num_generated = data.num_examples
            length = data.context_length or config.seq_len
            for split in ("train", "validation"):
                self.generated[split] = StdlibQA(split, config.seed, data.tasks, length, tokenizer, self.encoder.length)
        else:
            self.rows = Rows(data, config.seed, config.eval.num_examples, to_row)

    def examples_of_rows(self, epoch: int, first: int = 0) -> Iterator[list[Example]]:
        """The examples of every training row, in the order of the epoch, from row `first` on: as on every rank."""
        if self.rows is None:
            for index in range(first, self.num_generated):
                yield [self._generated_example("train", epoch, index, None)]
        else:
            for row in self.rows.epoch(epoch, first):
                yield self._examples(row)

    def examples_at(self, epoch: int, rows: list[int]) -> dict[int, list[Example]]:
        """The examples of the rows at these places in the order of the epoch."""
        if self.rows is None:
            return {i: [self._generated_example("train", epoch, i, None)] for i in rows}
        return {place: self._examples(row) for place, row in self.rows.at(epoch, rows).items()}

    def _examples(self, row: Row) -> list[Example]:
        """The examples of a row; of one that cannot be used, none where it is to be left out."""
        try:
            if isinstance(row.content, LRSAError):
                raise row.content
            return self.encoder.examples(row.content, row.index, row.place)
        except LRSAError as error:
            if self.on_bad_row == "error":
                raise
            return LeftOut(str(error))

    def fingerprint(self) -> str:
        """What the training rows are, so that a run which goes on notices when they have changed."""
        if self.rows is None:
            return f"{self.num_generated} questions over {documents_fingerprint()}"
        return self.rows.fingerprint()

    def validation_examples(self) -> list[Example]:
        """What answers are scored on: `eval.num_examples` rows, or as many of each task of the generated source."""
        return list(self._validation_examples())

    def check(self) -> None:
        """Encodes the validation rows and the first training row of a user's data."""
        if self.rows is not None:
            for _ in self._validation_examples():
                pass
        next(self.examples_of_rows(0), None)

    def _validation_examples(self) -> Iterator[Example]:
        if self.rows is None:
            for task in dict.fromkeys(self.generated["validation"].tasks):
                for index in range(self.num_validation):
                    yield self._generated_example("validation", 0, index, task)
        else:
            for row in self.rows.validation():
                yield from self._examples(row)

    def _generated_example(self, split: str, epoch: int, index: int, task: str | None) -> Example:
        """An uncut example: where joined texts have more tokens than their parts, with a little less context."""
        source = self.generated[split]
        margin = MARGIN
        while True:
            row = source.row(epoch, index, task, margin)
            example = self.encoder.uncut(row, index)
            excess = len(example.input_ids) - source.context_length
            if excess <= 0:
                return example
            margin += excess
            if margin > source.context_length:
                raise LRSAError(f"seq_len={source.context_length} is too short for a question of task {row['task']}.")


class Encoder:
    """Rows to examples, with what has to be known of the tokenizer looked up once.

    Args:
        tokenizer: any; its chat template is used if it has one and `chat_template` is true.
        seq_len: the most tokens of an example.
        chat_template: False writes "{context}\\n\\nQuestion: {question}\\nAnswer: {answer}" even if there is one.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, chat_template: bool = True):
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.use_template = chat_template and tokenizer.chat_template is not None
        marked = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.special_ids = frozenset(tokenizer.all_special_ids).union(marked)
        # A template writes the beginning-of-sequence token itself; without one, do as the tokenizer does.
        alone = tokenizer("").input_ids
        has_bos = tokenizer.bos_token_id is not None and alone[:1] == [tokenizer.bos_token_id]
        self.bos = [tokenizer.bos_token_id] if has_bos else []
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def examples(self, row: dict[str, Any], index: int = 0, place: object = "a row") -> list[Example]:
        """As `encode`; `place` names the row in an error."""
        try:
            row = canonical(row)
            if "text" in row:
                return self._text_examples(row, index)
            if "input_ids" in row:
                return tokenized_examples(row, index, self.seq_len, len(self.tokenizer))
            return [self._example(self._segments(row), row["task"], index, self.seq_len)]
        except LRSAError as error:
            raise LRSAError(f"{place}: {error}") from error

    def uncut(self, row: dict[str, Any], index: int) -> Example:
        """The example of a canonical row, however long."""
        return self._example(self._segments(row), row["task"], index, None)

    def length(self, row: dict[str, Any]) -> int:
        """The number of tokens of a canonical row, uncut."""
        return len(self.uncut(row, 0).input_ids)

    def _segments(self, row: dict[str, Any]) -> list[Segment]:
        if self.use_template:
            return chat_segments(row, self.tokenizer)
        if "messages" in row:
            raise LRSAError(
                "messages need a chat template: set data.chat_template=true and take a tokenizer that has one, "
                "or use prompt and completion."
            )
        return plain_segments(row)

    def _example(self, segments: list[Segment], task: str, index: int, limit: int | None) -> Example:
        tokens = self._tokens([segment.text for segment in segments])
        if segments[-1].kind == END and not self.special_ids.intersection(tokens[-1]):
            tokens[-1] = tokens[-1] + self.eos
        if not self.use_template:
            segments, tokens = [Segment("", FIXED), *segments], [self.bos, *tokens]
        if limit is not None:
            _cut(segments, tokens, limit)
        input_ids: list[int] = []
        labels: list[int] = []
        for segment, ids in zip(segments, tokens, strict=True):
            num_targets = len(ids) if segment.kind == TARGET else 0
            if segment.kind == END:
                num_targets = next((i + 1 for i, token in enumerate(ids) if token in self.special_ids), 0)
            input_ids += ids
            labels += ids[:num_targets] + [IGNORE] * (len(ids) - num_targets)
        labels[0] = IGNORE
        return Example(input_ids, labels, task, index)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def _text_examples(self, row: dict[str, Any], index: int) -> list[Example]:
        ids = self.bos + self._tokens([row["text"]])[0] + self.eos
        pieces = [ids[start : start + self.seq_len] for start in range(0, len(ids), self.seq_len)]
        # One token alone predicts nothing.
        return [Example(piece, [IGNORE, *piece[1:]], row["task"], index) for piece in pieces if len(piece) > 1]


def _cut(segments: list[Segment], tokens: list[list[int]], limit: int) -> None:
    """Takes tokens out of the middle of the cuttable segment, in place, until all of them are at most `limit`."""
    total = sum(map(len, tokens))
    if total <= limit:
        return
    place = next((i for i, segment in enumerate(segments) if segment.kind == CUTTABLE), None)
    ids = [] if place is None else tokens[place]
    least = total - len(ids) + (0 if place is None else min(len(ids), segments[place].keep))
    if least > limit:
        raise LRSAError(
            f"its question and answer alone need {least} tokens, more than seq_len={limit}: "
            "raise seq_len or leave the row out."
        )
    left = len(ids) - (total - limit)
    tokens[place] = ids[: (left + 1) // 2] + ids[len(ids) - left // 2 :]
