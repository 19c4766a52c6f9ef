"""A report on the training data before training: how much there is, what is cut, and how many steps it lasts."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby

from lrsa_ds.data.packing import IGNORE, Example, LeftOut, Packer
from lrsa_ds.data.stream import TrainingRows

# A survey of a sample ends after this many tokens; a row is always counted completely.
SAMPLED_TOKENS = 1_000_000


@dataclass(kw_only=True)
class DataReport:
    """Counts over rows of epoch 0, in order: all rows, or a sample of the first ones.

    Args:
        num_rows: training rows of an epoch; None if unknown.
        is_whole: whether all rows were read.
        num_read: rows that were read, including those left out.
        num_bad_rows: rows left out because they cannot be used; of all rows, if that is known.
        num_too_long_rows: rows left out because they are too long.
        num_examples, num_tokens, num_target_tokens: documents to train on, after cutting, and their tokens.
        num_cut_examples, num_cut_tokens: documents that were cut, and the tokens removed from them.
        num_lost_answers: cut documents whose context no longer contains the answer.
        short_length: the longest document, in tokens, that is never compressed.
        num_short_examples, num_short_tokens: documents of at most this length.
        num_sequences: packed sequences of these documents; in a sample, open sequences count as fractions.
        answer_lengths: target tokens of every answer that begins after the first `short_length` tokens of its document.
            Only before such an answer may the cache have dropped tokens.
    """

    num_rows: int | None
    is_whole: bool = False
    num_read: int = 0
    num_bad_rows: int = 0
    num_too_long_rows: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    num_cut_examples: int = 0
    num_cut_tokens: int = 0
    num_lost_answers: int = 0
    short_length: int = 0
    num_short_examples: int = 0
    num_short_tokens: int = 0
    num_sequences: float = 0.0
    answer_lengths: list[int] = field(default_factory=list)

    def add(self, examples: list[Example]) -> None:
        """Counts a row."""
        self.num_read += 1
        if isinstance(examples, LeftOut):
            self.num_too_long_rows += examples.is_too_long
            self.num_bad_rows += not examples.is_too_long
        for example in examples:
            length = len(example.input_ids)
            self.num_examples += 1
            self.num_tokens += length
            self.num_target_tokens += sum(label != IGNORE for label in example.labels)
            self.num_cut_examples += example.num_cut > 0
            self.num_cut_tokens += example.num_cut
            self.num_lost_answers += example.answer_lost
            if length <= self.short_length:
                self.num_short_examples += 1
                self.num_short_tokens += length
            else:
                self.answer_lengths += _answer_lengths(example.labels, self.short_length)

    @property
    def share_cut(self) -> float:
        """The share of all tokens that is cut."""
        return self.num_cut_tokens / max(1, self.num_cut_tokens + self.num_tokens)

    @property
    def share_short(self) -> float:
        """The share of the tokens trained on that is in documents too short to be compressed."""
        return self.num_short_tokens / max(1, self.num_tokens)

    def sequences_of_epoch(self) -> float | None:
        """Packed sequences of an epoch: counted, estimated from the sample, or None if unknown."""
        if self.is_whole or self.num_rows is None:
            return self.num_sequences if self.is_whole else None
        return self.num_sequences * self.num_rows / max(1, self.num_read)

    def row(self) -> dict:
        """For `metrics.jsonl`."""
        row = asdict(self)
        row["answer_length_p90"], row["answer_length_max"] = self.long_answers()
        del row["answer_lengths"]
        return row

    def long_answers(self) -> tuple[int, int]:
        """The 90th percentile of the answer lengths, and the maximum; 0 if there are no answers."""
        ordered = sorted(self.answer_lengths)
        return (ordered[(len(ordered) * 9) // 10], ordered[-1]) if ordered else (0, 0)

    def lines(self, sequences_per_step: int, num_steps: int) -> list[str]:
        """The report in sentences, for a run of `num_steps` steps."""
        of = "" if self.num_rows is None else f" of {self.num_rows:,}"
        rows = f"all {self.num_read:,} rows" if self.is_whole else f"a sample, the first {self.num_read:,} rows{of}"
        lines = [f"data: counted over {rows}: {self.num_examples:,} documents of {self.num_tokens:,} tokens"]
        if self.num_bad_rows or self.num_too_long_rows:
            lines.append(
                f"data: {self.num_bad_rows:,} rows are left out since they cannot be used, {self.num_too_long_rows:,} "
                "since they are too long"
            )
        if self.num_cut_examples:
            lines.append(
                f"data: {self.num_cut_examples:,} documents are cut, which takes {self.share_cut:.1%} of all tokens; "
                f"{self.num_lost_answers:,} of them lose the answer that stood there"
            )
        return [*lines, self._lasting(sequences_per_step, num_steps)]

    def _lasting(self, sequences_per_step: int, num_steps: int) -> str:
        targets = self.num_target_tokens / max(self.num_sequences, 1e-9) * sequences_per_step
        per_epoch = self.sequences_of_epoch()
        about = "" if self.is_whole else "about "
        lasting = f"data: about {targets:,.0f} target tokens a step"
        if per_epoch:
            lasting += f"; {num_steps:,} steps are {about}{num_steps * sequences_per_step / per_epoch:.2f} epochs"
        return lasting


def _answer_lengths(labels: list[int], behind: int) -> list[int]:
    """Lengths of the runs of targets that begin after the first `behind` tokens; none if `behind` is 0."""
    runs = groupby(range(1, len(labels)), key=lambda place: labels[place] != IGNORE)
    answers = [list(places) for is_target, places in runs if is_target]
    return [len(places) for places in answers if 0 < behind <= places[0]]


def survey(data: TrainingRows, short_length: int, limit: int | None = SAMPLED_TOKENS) -> DataReport:
    """Reads the rows of epoch 0: all of them, or up to `limit` tokens.

    Args:
        data: its attributes `num_rows`, `num_bad_rows` and `num_too_long_rows` are optional: the rows of an epoch, and
            how many of them are known to be unusable or too long.

    Raises:
        LRSAError: a row cannot be used.
    """
    report = DataReport(num_rows=getattr(data, "num_rows", None), short_length=short_length)
    packer, num_closed = Packer(data.seq_len), 0
    rows = data.examples_of_rows(0)
    while limit is None or report.num_tokens < limit:
        examples = next(rows, None)
        if examples is None:
            report.is_whole, report.num_rows = True, report.num_read
            break
        report.add(examples)
        num_closed += sum(len(packer.add(example)) for example in examples)
    open_tokens = sum(len(example.input_ids) for members in packer.open for example in members)
    report.num_bad_rows = max(report.num_bad_rows, getattr(data, "num_bad_rows", 0))
    report.num_too_long_rows = max(report.num_too_long_rows, getattr(data, "num_too_long_rows", 0))
    report.num_sequences = num_closed + (len(packer.flush()) if report.is_whole else open_tokens / data.seq_len)
    return report


def steps_of_epochs(data: TrainingRows, num_epochs: float, sequences_per_step: int) -> int:
    """Steps in which every row is trained on `num_epochs` times; the last step is filled with rows of the next epoch.

    All rows are read; once for each epoch, if `data` does not provide their order (`row_order`).
    """
    order_of = getattr(data, "row_order", lambda epoch: None)
    lengths: dict[int, list[int]] = {}
    total, whole = 0.0, int(num_epochs)
    for epoch in range(whole + (num_epochs > whole)):
        order = order_of(epoch) if epoch else None
        if order is None:
            rows = (_lengths(examples, lengths) for examples in data.examples_of_rows(epoch))
        else:
            rows = (lengths.get(index, []) for index in order)
        total += num_packed(rows, data.seq_len) * min(1.0, num_epochs - epoch)
    return max(1, math.ceil(total / sequences_per_step))


def _lengths(examples: list[Example], known: dict[int, list[int]]) -> list[int]:
    lengths = [len(example.input_ids) for example in examples]
    if examples:
        known[examples[0].index] = lengths
    return lengths


def num_packed(rows: Iterable[list[int]], seq_len: int) -> int:
    """Packed sequences of documents with these lengths, row by row."""
    packer, num_closed = Packer(seq_len), 0
    for length in (length for row in rows for length in row):
        # Only the length of an example matters here.
        num_closed += len(packer.add(Example(range(length), [], "", 0)))
    return num_closed + len(packer.flush())
