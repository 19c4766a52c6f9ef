"""What a run has found, in three sentences: what changed, how far to trust it, and what to do next."""

import math
from pathlib import Path

from lrsa_ds.labels import cache_of, caches_in_order, factor_name, rows_of_smallest


def findings(rows: list[dict], picture: Path, model: Path | None) -> list[str]:
    """Three sentences about the evaluations of a run.

    Args:
        rows: of one run, as for `lrsa_ds.logs.report.evaluation_table`; with `num_answers` where a row has several.
        picture: the figure of all scores.
        model: the directory of the exported model.
    """
    smallest = rows_of_smallest(rows)
    last = [row for row in smallest if row["when"] == "after"]
    first = [row for row in smallest if row["when"] == "before"]
    largest = caches_in_order(rows)[0]
    dense = [row for row in rows if row["when"] == "after" and cache_of(row) == largest]
    count = sum(_num_answers(last))
    cache = f"{cache_of(last[0])}, {factor_name(row.get('cache_factor') for row in last)} smaller"
    change = _change(first, last, "token_accuracy"), _change(first, last, "exact_match")
    seen = (
        f"Seen: from the smallest cache ({cache}), {change[0]} of the tokens of answers are right and {change[1]} of "
        f"the answers exact; from the largest ({largest}) {_mean(dense, 'token_accuracy'):.0f} % and "
        f"{_mean(dense, 'exact_match'):.0f} %."
    )
    # Two standard errors of a share near one half, the widest that there is.
    margin = 100 / math.sqrt(count)
    trust = (
        f"Trust: with {count} answers a share is known to about ±{margin:.0f} points, so smaller differences may be "
        f"chance; {picture} shows all caches and tasks."
    )
    more = "train longer (optim.num_steps) or on your own rows (data=files data.path=FILE)"
    ask = f'ask the model with `python -m lrsa_ds chat {model} FILE "Question?"`, or ' if model else ""
    return [seen, trust, f"Next: {ask}{more}."]


def _num_answers(rows: list[dict]) -> list[int]:
    """Of each row."""
    return [row.get("num_answers", row["num_examples"]) for row in rows]


def _mean(rows: list[dict], name: str) -> float:
    """Over all answers of all tasks, in percent."""
    counts = _num_answers(rows)
    return sum(row[name] * count for row, count in zip(rows, counts, strict=True)) / sum(counts)


def _change(first: list[dict], last: list[dict], name: str) -> str:
    before = f" (before training {_mean(first, name):.0f} %)" if first else ""
    return f"{_mean(last, name):.0f} %{before}"
