"""Samples from files: extractive questions in any of the shapes of training, and LongBench.

LongBench is read from the user's own JSONL copies. Questions are put in our own frame (context, question) and answers
are cut at nothing, so scores compare within one evaluation, not with published tables.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.files import find_files
from lrsa_ds.data.mixture import open_rows
from lrsa_ds.data.stores import rows_of
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.evaluator import Sample
from lrsa_ds.settings.data import DataConfig
from recipes.longeval import to_sample

# The data sets of LongBench (arXiv 2308.14508) in English and code, by metric.
_LONGBENCH_BY_METRIC = {
    "f1": ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
    "rouge_l": ("gov_report", "qmsum", "multi_news", "samsum"),
    "hit": ("trec",),
    "count": ("passage_count", "passage_retrieval_en"),
    "similarity": ("lcc", "repobench-p"),
}
LONGBENCH = {name: metric for metric, names in _LONGBENCH_BY_METRIC.items() for name in names}
# Where a row has no question of its own.
DEFAULT_QUESTIONS = {
    "rouge_l": "Summarize the text above.",
    "count": "How many different passages are there?",
    "similarity": "What is the next line of this code? Give only this line.",
}


@dataclass(frozen=True)
class Entry:
    """A row in one of the canonical shapes, what counts as right, and how it is scored."""

    row: dict[str, Any]
    answers: list[str]
    metrics: tuple[str, ...]
    may_be_cut: bool = True


class FileSamples:
    """Samples of tasks whose rows are given; at most `num_samples` of each, drawn by the seed."""

    def __init__(self, tokenizer: Tokenizer, entries: dict[str, list[Entry]], chat_template: bool = True):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.entries = entries

    def sample(self, task: str, length: int, index: int) -> Sample:
        """A prompt of at most `length` tokens with its answer; of too long a context the middle is taken out.

        Raises:
            LRSAError: the row does not fit, and its task does not allow to cut it.
        """
        entry = self.entries[task][index]
        encoder = Encoder(self.tokenizer, length, self.chat_template)
        if not entry.may_be_cut and (needed := encoder.length(entry.row)) > length:
            raise LRSAError(f"lengths={length} is too short for {task}, whose facts may not be cut: give {needed}.")
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


def longbench_entries(path: str, seed: int, num_samples: int) -> dict[str, list[Entry]]:
    """Rows of LongBench's form: `input`, `context`, `answers` and `dataset`, which the name of the file replaces."""
    found: dict[str, list[Entry]] = {}
    for place, name, row in _json_rows("longbench", path):
        name = str(row.get("dataset") or name).removesuffix("_e")
        if name not in LONGBENCH:
            raise LRSAError(f"{place}: LongBench's {name} is not supported; valid here: {', '.join(LONGBENCH)}.")
        metric = LONGBENCH[name]
        answers = _texts(row, "answers", place)
        question = _text(row, "input", place) or DEFAULT_QUESTIONS.get(metric, "")
        canonical = {"context": _text(row, "context", place), "question": question, "answer": answers[0]}
        found.setdefault(f"longbench/{name}", []).append(Entry(canonical | {"task": name}, answers, (metric,)))
    return {name: _drawn(entries, seed, num_samples) for name, entries in found.items()}


def _json_rows(key: str, value: str) -> Iterator[tuple[str, str, dict]]:
    """Place, name of the task, and row, of every row of the files."""
    for path in find_files(key, value, subfolders=True):
        stem, folder = Path(path).stem, Path(path).resolve().parent.name
        name = folder if stem in ("validation", "test") else stem
        for place, row in rows_of(path):
            if not isinstance(row, dict):
                raise LRSAError(f"{place}: a row has to be an object with named columns.")
            yield place, name, row


def _text(row: dict, key: str, place: str) -> str:
    if not isinstance(row.get(key), str):
        raise LRSAError(f"{place}: {key} is missing or not text.")
    return row[key]


def _texts(row: dict, key: str, place: str) -> list[str]:
    texts = row.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise LRSAError(f"{place}: {key} has to be a list of texts, and not an empty one.")
    return texts


def _drawn(entries: list[Entry], seed: int, num_samples: int) -> list[Entry]:
    return random.Random(seed).sample(entries, min(num_samples, len(entries)))
