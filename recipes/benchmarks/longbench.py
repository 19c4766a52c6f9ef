"""LongBench (arXiv 2308.14508) and LongBench-E: `data/TASK.jsonl` and `data/TASK_e.jsonl` as they are published.

Prompts and limits of the answers are read from the `config` folder of the authors' repository, which has to be in the
folder of the data or in one above it. As in their code, few-shot and code tasks do not use the chat template, and the
middle of a prompt that is too long is removed. Rows of LongBench-E are grouped by their lengths in words.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lrsa_ds.errors import LRSAError, require
from recipes.benchmarks.benchmark import Benchmark, Case, text_of, texts_of, whole_number_of
from recipes.benchmarks.files import Row, benchmark_rows
from recipes.benchmarks.longbench_metrics import METRICS, require_libraries

KEY = "longbench"
CONFIG = "config"
LEVELS = 4  # folders that may hold it: that of the data and three above
_TASKS_BY_METRIC = {
    "qa_f1": ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
    "qa_f1_zh": ("multifieldqa_zh",),
    "qa_f1_first_line": ("triviaqa",),
    "rouge": ("gov_report", "qmsum", "multi_news"),
    "rouge_zh": ("dureader", "vcsum"),
    "rouge_first_line": ("samsum",),
    "classification": ("trec", "lsht"),
    "count": ("passage_count",),
    "retrieval": ("passage_retrieval_en",),
    "retrieval_zh": ("passage_retrieval_zh",),
    "code_sim": ("lcc", "repobench-p"),
}
TASKS = {task: metric for metric, tasks in _TASKS_BY_METRIC.items() for task in tasks}
ALONE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # outside the chat template
STOPS = {"samsum": "\n"}
BUCKETS = {"0-4k": 4000, "4-8k": 8000}  # of LongBench-E, each below so many words; longer ones: 8k+


class Asked(NamedTuple):
    """How the authors ask: by task, a prompt with {context} and {input}, and the most tokens of an answer."""

    prompts: dict[str, str]
    limits: dict[str, int]


def read(path: str) -> Iterator[Case]:
    asked = None
    for row in benchmark_rows(KEY, path, ignored=CONFIG):
        asked = asked or _asked(path)
        yield _case(row, asked)


def _asked(path: str) -> Asked:
    """Prompts and limits from the `config` folder beside or above the data.

    Raises:
        LRSAError: there is none, or it does not hold all tasks.
    """
    data = Path(path).expanduser().absolute()
    for folder in [data, *data.parents][: LEVELS + 1]:
        files = [folder / CONFIG / name for name in ("dataset2prompt.json", "dataset2maxlen.json")]
        if all(file.is_file() for file in files):
            asked = Asked(*map(_by_task, files))
            missing = [task for task in TASKS if task not in asked.prompts or task not in asked.limits]
            require(not missing, f"{folder / CONFIG} has no prompt or no limit for {', '.join(missing)}.")
            return asked
    raise LRSAError(
        f"{KEY}={path!r}: its prompts are missing, config/dataset2prompt.json and config/dataset2maxlen.json of "
        "github.com/THUDM/LongBench (folder LongBench): copy config beside the data or into a folder above."
    )


def _by_task(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LRSAError(f"{file} cannot be read ({error}): copy it again from github.com/THUDM/LongBench.") from error
    require(isinstance(found, dict), f"{file} holds no object of tasks: copy it again from github.com/THUDM/LongBench.")
    return found


def _case(row: Row, asked: Asked) -> Case:
    name, in_buckets = _name(row)
    metric, place = TASKS[name], row.place
    require_libraries(metric, f"{KEY}/{name}")
    prompt = asked.prompts[name].format(
        context=text_of(row.content, "context", place), input=text_of(row.content, "input", place)
    )
    answers = texts_of(row.content, "answers", place, may_be_empty=True)
    return Case(
        task=f"{name}_e/{_bucket(row)}" if in_buckets else name,
        prompt=prompt,
        answers=answers,
        expected=answers[0],
        metric=metric,
        max_new_tokens=asked.limits[name],
        in_turn=name not in ALONE,
        may_be_cut=True,
        classes=texts_of(row.content, "all_classes", place) if metric == "classification" else (),
        stop=STOPS.get(name, ""),
    )


def _name(row: Row) -> tuple[str, bool]:
    """The task, which the file names or else the row does, and whether it is one of LongBench-E."""
    for name in (row.task, row.content.get("dataset")):
        if isinstance(name, str) and name.removesuffix("_e") in TASKS:
            return name.removesuffix("_e"), name.endswith("_e")
    raise LRSAError(
        f"{row.place}: LongBench has no task {row.task!r}, which is the name of the file: it has {', '.join(TASKS)}."
    )


def _bucket(row: Row) -> str:
    words = whole_number_of(row.content, "length", row.place)
    return next((name for name, end in BUCKETS.items() if words < end), "8k+")


LONGBENCH = Benchmark(read, METRICS)
