"""The evaluations of a run as a table for the terminal and as a picture; rows are those of `lrsa_ds.evaluation`."""

import math
from fractions import Fraction
from pathlib import Path

from lrsa_ds.errors import LRSAError

TASKS_PER_BLOCK = 3  # so that a line of the table stays within 100 columns
PANELS_PER_LINE = 4
METRICS = {"exact_match": "exact match %", "token_accuracy": "token acc. %"}
BEFORE, AFTER = "#8a8f98", "#1f6feb"


def evaluation_table(rows: list[dict]) -> str:
    """Scores in percent, one line per cache and one pair of columns per task: "before → after", or what there is.

    Args:
        rows: `when` ("before", "step N" or "after"; the first and the last are shown), `task`, `retention` in (0, 1],
            `exact_match` and `token_accuracy` in percent, `num_examples`.

    Returns:
        Lines of at most 100 columns; more than three tasks go below each other. "-" is a score that was not taken.
    """
    tasks = _in_order(rows, "task")
    blocks = [tasks[i : i + TASKS_PER_BLOCK] for i in range(0, len(tasks), TASKS_PER_BLOCK)]
    tables = ["\n".join(_block(rows, block)) for block in blocks]
    times = " → ".join(_phrase(when) for when in _times(rows))
    return "\n\n".join([*tables, f"{times}; token acc.: the share of the answers' tokens that are right"])


def _block(rows: list[dict], tasks: list[str]) -> list[str]:
    width = 13  # of "100.0 → 100.0" and of "exact match %"
    names, headers = ["     "], ["cache"]
    for task in tasks:
        count = f" ({_num_examples(rows, task)} examples)"
        room = 2 * width + 2 - len(count)
        names.append(f"{(task if len(task) <= room else task[: room - 1] + '…') + count:^{2 * width + 2}}")
        headers.append("  ".join(f"{label:>{width}}" for label in METRICS.values()))
    lines = [" │ ".join(names).rstrip(), " │ ".join(headers)]
    for retention in sorted({row["retention"] for row in rows}, reverse=True):
        cells = ["  ".join(f"{_cell(rows, task, retention, name):>{width}}" for name in METRICS) for task in tasks]
        lines.append(" │ ".join([f"{_compression(retention):<5}", *cells]))
    return lines


def _cell(rows: list[dict], task: str, retention: float, metric: str) -> str:
    scores = []
    for when in _times(rows):
        found = [r for r in rows if (r["when"], r["task"], r["retention"]) == (when, task, retention)]
        value = found[-1].get(metric) if found else None
        scores.append("-" if value is None or math.isnan(value) else f"{value:.1f}")
    return " → ".join([scores[0], *(f"{score:>5}" for score in scores[1:])])


def _num_examples(rows: list[dict], task: str) -> str:
    return "/".join(dict.fromkeys(str(row["num_examples"]) for row in rows if row["task"] == task))


def _in_order(rows: list[dict], name: str) -> list:
    return list(dict.fromkeys(row[name] for row in rows))


def _times(rows: list[dict]) -> list[str]:
    """The first and the last time at which the rows were taken."""
    times = _in_order(rows, "when")
    order = {"before": -1, "after": math.inf}
    times = sorted(times, key=lambda when: order[when] if when in order else int(when.removeprefix("step ")))
    return times if len(times) < 2 else [times[0], times[-1]]


def _phrase(when: str) -> str:
    return f"{when} training" if when in ("before", "after") else f"at {when}"


def _compression(retention: float) -> str:
    return "full" if retention == 1 else f"{1 / retention:.3g}x" if 1 / retention >= 10 else f"{1 / retention:.2g}x"


def _share(retention: float) -> str:
    share = Fraction(retention).limit_denominator(1024)
    return "full" if retention == 1 else f"1/{share.denominator}" if share.numerator == 1 else f"{retention:.2g}"


def draw_evaluation(rows: list[dict], path: Path, title: str) -> None:
    """Writes a PNG of the scores in percent over the share of the KV cache that is kept, one panel per task.

    Args:
        rows: as for `evaluation_table`.

    Raises:
        LRSAError: `path` cannot be written.
    """
    # Only here: every rank of every run would wait more than half a second for what rank 0 draws in the end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = _in_order(rows, "task")
    num_columns = min(len(tasks), PANELS_PER_LINE)
    num_lines = -(-len(tasks) // num_columns)
    legend = _legend(_times(rows))
    legend_columns = 4 if num_columns > 3 else 2
    height = 0.5 + 2.65 * num_lines + 0.25 * -(-len(legend) // legend_columns)
    figure = Figure(figsize=(max(5.2, 3.1 * num_columns), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False)
    for number, panel in enumerate(panels.flat):
        if number < len(tasks):
            _draw_panel(panel, rows, tasks[number])
            if is_lowest := number + num_columns >= len(tasks):
                panel.set_xlabel("share of the KV cache kept", fontsize=8.5)
            panel.tick_params(labelbottom=is_lowest)
        else:
            panel.set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for panel in panels[:, 0]:
        panel.set_ylabel("% right", fontsize=8.5)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=8.5, handlelength=3.2
    )
    try:
        figure.savefig(path)
    except OSError as error:
        raise LRSAError(f"{path} cannot be written: {error.strerror}.") from error


def _is_start(when: str, times: list[str]) -> bool:
    return when == "before" or (len(times) == 2 and when == times[0])


def _style(is_start: bool, metric: str) -> dict:
    style = {"color": BEFORE if is_start else AFTER, "linestyle": "--" if is_start else "-"}
    if metric == "exact_match":
        return style | {"marker": "o", "markersize": 4.5, "linewidth": 1.9}
    return style | {"marker": ".", "linewidth": 1.1, "alpha": 0.45}


def _legend(times: list[str]) -> list:
    from matplotlib.lines import Line2D

    names = {"exact_match": "exact answers", "token_accuracy": "answer tokens"}
    return [
        Line2D([], [], **_style(_is_start(w, times), m), label=f"{name}, {_phrase(w)}")
        for m, name in names.items()
        for w in times
    ]


def _draw_panel(panel, rows: list[dict], task: str) -> None:
    for when in _times(rows):
        mine = sorted((r for r in rows if (r["when"], r["task"]) == (when, task)), key=lambda row: row["retention"])
        for metric in ("token_accuracy", "exact_match"):
            panel.plot(
                [r["retention"] for r in mine],
                [r[metric] for r in mine],
                **_style(_is_start(when, _times(rows)), metric),
            )
    retentions = sorted({row["retention"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(retentions, [_share(retention) for retention in retentions], minor=False)
    panel.minorticks_off()
    # The whole cache on the left, as in the table's first line; room at both ends for the markers.
    panel.set_xlim(retentions[-1] * 1.2, retentions[0] / 1.2)
    panel.set_ylim(-4, 104)
    panel.set_yticks(range(0, 101, 25))
    panel.set_title(f"{task} ({_num_examples(rows, task)} examples)", fontsize=9.5)
    panel.tick_params(labelsize=8.5)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
