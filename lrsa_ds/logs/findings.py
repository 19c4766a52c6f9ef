"""What a run has found, in three sentences: what changed, how far to trust it, and what to do next."""

from pathlib import Path

from lrsa_ds.intervals import combined_interval, interval_of
from lrsa_ds.labels import cache_of, caches_in_order, factor_name, rows_of_smallest


def findings(rows: list[dict], picture: Path, model: Path | None) -> list[str]:
    """Three sentences about the evaluations of a run.

    Args:
        rows: of one run, as for `lrsa_ds.logs.report.evaluation_table`, with the intervals of `lrsa_ds.train.scoring`;
            and with `num_answers` where an example, a context with its questions, has several.
        picture: the figure of all scores.
        model: the directory of the exported model.
    """
    smallest = rows_of_smallest(rows)
    last = [row for row in smallest if row["when"] == "after"]
    first = [row for row in smallest if row["when"] == "before"]
    largest = caches_in_order(rows)[0]
    dense = [row for row in rows if row["when"] == "after" and cache_of(row) == largest]
    cache = f"{cache_of(last[0])}, {factor_name(row.get('cache_factor') for row in last)} smaller"
    change = _change(first, last, "token_accuracy"), _change(first, last, "exact_match")
    seen = (
        f"Seen: from the smallest cache ({cache}), {change[0]} of the tokens of answers are right and {change[1]} of "
        f"the answers exact; from the largest ({largest}) {_mean(dense, 'token_accuracy'):.0f} % and "
        f"{_mean(dense, 'exact_match'):.0f} %."
    )
    count = sum(_num_answers(last))
    ends = [interval_of(row, "exact_match") for row in last]
    _, low, high = combined_interval([row["exact_match"] for row in last], ends, _num_answers(last))
    contexts = sum(row["num_examples"] for row in last)
    basis = f"{count} answer{'s' * (count != 1)}"
    if contexts < count:
        basis += f" about {contexts} context{'s' * (contexts != 1)}; answers about one context are not independent"
    trust = (
        f"Trust: exact answers from that cache lie between {max(0, low):.0f} and {min(100, high):.0f} % (95 % interval "
        f"of {basis}), so smaller differences may be chance; {picture} shows all caches and tasks."
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
