"""Samples from files: extractive questions in any of the shapes of training."""

from dataclasses import dataclass
from typing import Any

from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.mixture import open_rows
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.evaluator import Sample
from lrsa_ds.settings.data import DataConfig
from recipes.longeval import to_sample


@dataclass(frozen=True)
class Entry:
    """A row in one of the canonical shapes, its right answers, and its metrics."""

    row: dict[str, Any]
    answers: list[str]
    metrics: tuple[str, ...]


class FileSamples:
    """Samples of tasks whose rows are given; at most `num_samples` of each, drawn by the seed."""

    def __init__(self, tokenizer: Tokenizer, entries: dict[str, list[Entry]], chat_template: bool = True):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.entries = entries

    def sample(self, task: str, length: int, index: int) -> Sample:
        """A prompt of at most `length` tokens including its answer; a context that is too long loses its middle."""
        entry = self.entries[task][index]
        encoder = Encoder(self.tokenizer, length, self.chat_template)
        identity = dict(task=task, index=index, length=length)
        return to_sample(encoder, entry.row, entry.answers, entry.metrics, **identity)


def qa_entries(data: DataConfig, seed: int, num_samples: int) -> dict[str, list[Entry]]:
    """The rows that a training run with this `data` would hold out, scored as SQuAD scores."""
    entries = []
    for held_out in open_rows(data, seed, num_samples).validation():
        row = held_out.content
        assert isinstance(row, dict)  # only rows that can be used are held out
        if "text" in row or "input_ids" in row:
            kind = "plain text" if "text" in row else "tokenized"
            raise LRSAError(f"{held_out.place}: a validation row is {kind}, which asks nothing.")
        entries.append(Entry(row, _right_answers(row), ("f1", "exact")))
    return {"qa": entries}


def _right_answers(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [next(m["content"] for m in reversed(row["messages"]) if m["role"] == "assistant")]
    return row.get("answers") or [row.get("answer") or row["completion"]]
