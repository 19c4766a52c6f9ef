"""RULER (arXiv 2404.06654): the folders that its scripts fill, `TASK/validation.jsonl`, as they are.

A row has `input`, `outputs` and `answer_prefix`; rows of earlier versions have the prefix at the end of `input`. Rows
as NVIDIA kvpress publishes RULER have `context`, `question`, `answer_prefix`, `answer`, `task` and `max_new_tokens`.
The folder of the tasks, or the one above `data`, is the length that prompts were made for if its name is a number.

Limits of the answers and metrics are those of github.com/NVIDIA/RULER, commit c3f5e3b (scripts/data/synthetic and
scripts/eval/synthetic, constants.py).
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lrsa_ds.errors import LRSAError
from recipes.benchmarks.benchmark import Benchmark, Case, text_of, texts_of, whole_number_of
from recipes.benchmarks.files import Row, benchmark_rows

KEY = "ruler"
# The folder with the outputs of models.
PREDICTIONS = "pred"


class Family(NamedTuple):
    """The common properties of tasks: the limit of an answer, the beginning of its prefix, and the metric."""

    max_new_tokens: int
    prefix_start: str
    metric: str


# By the first word of a task's name: niah_multikey_1, qa_2, vt.
FAMILIES = {
    "niah": Family(128, " The special magic", "string_match_all"),
    "vt": Family(30, " Answer:", "string_match_all"),
    "cwe": Family(120, " Answer:", "string_match_all"),
    "fwe": Family(50, " Answer:", "string_match_all"),
    "qa": Family(32, " Answer:", "string_match_part"),
}


def read(path: str) -> Iterator[Case]:
    for row in benchmark_rows(KEY, path, ignored=PREDICTIONS):
        yield _case(row)


def _case(row: Row) -> Case:
    from_kvpress = "context" in row.content
    task, place = text_of(row.content, "task", row.place) if from_kvpress else row.task, row.place
    family = FAMILIES.get(task.split("_")[0])
    if family is None:
        raise LRSAError(
            f"{place}: RULER has no task {task!r}, whose name is that of the folder or file, or the column task: it "
            f"begins with one of {', '.join(FAMILIES)}."
        )
    answers = texts_of(row.content, "answer" if from_kvpress else "outputs", place)
    prompt, prefix = (_split_prompt if from_kvpress else _prompt)(row, family)
    limit = whole_number_of(row.content, "max_new_tokens", place, 1) if from_kvpress else family.max_new_tokens
    all_of_them = family.metric == "string_match_all"
    return Case(
        task=task,
        prompt=prompt,
        answers=answers,
        expected=", ".join(answers) if all_of_them else answers[0],
        metric=family.metric,
        max_new_tokens=limit,
        answer_prefix=prefix,
        length=_length(row),
    )


def _prompt(row: Row, family: Family) -> tuple[str, str]:
    """The question, and the beginning of the answer."""
    asked = text_of(row.content, "input", row.place)
    if row.content.get("answer_prefix") is not None:
        return asked, text_of(row.content, "answer_prefix", row.place)
    place = asked.rfind(family.prefix_start)
    return (asked, "") if place < 0 else (asked[:place], asked[place:])


def _split_prompt(row: Row, family: Family) -> tuple[str, str]:
    """The same of a row of kvpress, which has it in parts."""
    context, question, prefix = (
        text_of(row.content, key, row.place) for key in ("context", "question", "answer_prefix")
    )
    return context + question, prefix


def _length(row: Row) -> int | None:
    """From LENGTH/data/TASK, LENGTH/TASK, or LENGTH itself; a number further above is something else, as a date."""
    places = row.folders[-1:-3:-1] + (row.folders[-3:-2] if row.folders[-2:-1] == ("data",) else ())
    return next((int(name) for name in places if re.fullmatch(r"[1-9]\d{2,}", name)), None)


def _cleaned(prediction: str) -> str:
    """Lower case, stripped, and each control character a new line."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()


def string_match_all(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the answers that the prediction contains."""
    said = _cleaned(prediction)
    return sum(answer.lower() in said for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Whether the prediction contains one of the answers."""
    said = _cleaned(prediction)
    return float(any(answer.lower() in said for answer in answers))


RULER = Benchmark(read, {"string_match_all": string_match_all, "string_match_part": string_match_part})
