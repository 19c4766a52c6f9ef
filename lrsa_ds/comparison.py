"""Comparison of runs with the same questions, question by question: `launch/compare.py`.

Shapes: R runs of a group, C contexts, B bootstrap samples, 5 sums (`SUMS`).
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lrsa_ds.errors import LRSAError, require
from lrsa_ds.labels import caches_in_order, factor_name
from lrsa_ds.logs.journal import read_rows
from lrsa_ds.logs.metrics import ANSWERS
from lrsa_ds.pictures import GREY, LABEL, TICK, cache_colors, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUMS = ("num_answers", "num_exact", "num_tokens", "num_correct", "nll")
METRICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # from sums [..., 5]
    "exact_match": lambda sums: 100 * sums[..., 1] / sums[..., 0],
    "token_accuracy": lambda sums: 100 * sums[..., 3] / sums[..., 2],
    "nll": lambda sums: sums[..., 4] / sums[..., 2],
}
HEADINGS = {"exact_match": "exact %", "token_accuracy": "tokens %", "nll": "nll"}
AXES = {"exact_match": "exact answers, %", "token_accuracy": "correct answer tokens, %", "nll": "nats per answer token"}
NUM_SAMPLES = 4000
TAILS = (0.025, 0.975)  # of a 95 % interval
MARKERS = ("o", "s", "^", "D", "v", "P")  # of the groups; colours are those of the caches


@dataclass(frozen=True)
class Group:
    """Runs that differ only by their seed, and the questions and scores of each: `rows` of `answers.jsonl`."""

    name: str
    directories: list[Path]
    rows: list[list[dict]]


def read_group(name: str, directories: Sequence[Path], when: str) -> Group:
    """The answers of the runs of a group at a moment: "before", "after" or "step N".

    Raises:
        LRSAError: a directory has no such answers.
    """
    everything = []
    for directory in directories:
        path = directory / ANSWERS
        require(path.is_file(), f"{path} does not exist: give directories of runs that were evaluated.")
        rows = [row for row in read_rows(path) if row["when"] == when]
        require(rows != [], f"{path} has no answers of the evaluation {when!r}: choose another moment with --when.")
        everything.append(rows)
    return Group(name, list(directories), everything)


def compare(groups: Sequence[Group], seed: int = 0) -> list[dict]:
    """A row for each task, cache and group, with the groups in the given order.

    Each metric has its mean over all runs and questions, `<metric>`, with a 95 % interval, `<metric>_low` and `_high`,
    and its difference from the first group, `<metric>_difference` with `_difference_low` and `_difference_high`. The
    intervals are percentiles of a bootstrap that draws contexts (questions about one context are not independent) and
    runs. The same contexts and the same runs, by their place, are drawn in all groups, so differences are paired.

    Raises:
        LRSAError: the groups have different numbers of runs, or runs at the same place did not answer the same
            questions under caches of the same size.
    """
    require(len(groups) > 1, "give two groups of runs or more.")
    for group in groups[1:]:
        _check_alike(groups[0], group)
    first = groups[0].rows[0]
    rows = []
    for task in dict.fromkeys(row["task"] for row in first):
        for cache in caches_in_order([row for row in first if row["task"] == task]):
            rows += _compared(groups, task, cache, seed)
    return rows


def _check_alike(one: Group, other: Group) -> None:
    require(
        len(one.rows) == len(other.rows),
        f"{one.name} has {len(one.rows)} runs and {other.name} {len(other.rows)}: give as many of each, in the same "
        "order of their seeds.",
    )
    for place, (mine, theirs) in enumerate(zip(one.rows, other.rows, strict=True)):
        pair = f"{one.directories[place]} and {other.directories[place]}"
        asked, asked_there = ({_question(row): row["cache_factor"] for row in rows} for rows in (mine, theirs))
        common = asked.keys() & asked_there.keys()
        require(
            asked.keys() == asked_there.keys(),
            f"{pair} were not asked the same questions under the same caches: {len(common)} answers of {len(asked)} "
            f"and {len(asked_there)} are in both. Give them the same data, seed, tokenizer and caches.",
        )
        differing = [question for question in common if not math.isclose(asked[question], asked_there[question])]
        require(
            not differing,
            f"{pair} have caches of different sizes under one name ({', '.join(sorted({q[-1] for q in differing}))}).",
        )


def _question(row: dict) -> tuple:
    return row["task"], row["context"], row["answer"], row["cache"]


def _compared(groups: Sequence[Group], task: str, cache: str, seed: int) -> list[dict]:
    asked = [row for rows in groups[0].rows for row in rows if (row["task"], row["cache"]) == (task, cache)]
    contexts = sorted({row["context"] for row in asked})
    sums = [_sums(group, task, cache, contexts) for group in groups]
    weights_BRC = _bootstrap_weights(len(groups[0].rows), len(contexts), seed)
    known = {"task": task, "cache": cache, "retention": asked[0]["retention"]}
    known["cache_factor"] = sum(row["cache_factor"] for row in asked) / len(asked)
    rows = []
    for group, sums_RC5 in zip(groups, sums, strict=True):
        row = known | {"group": group.name, "num_runs": len(group.rows), "num_contexts": len(contexts)}
        row["num_questions"] = int(sums_RC5[..., 0].sum().item()) // len(group.rows)
        for metric, of in METRICS.items():
            found, base = (
                (of(x.sum(dim=(0, 1))), of(torch.einsum("brc,rcs->bs", weights_BRC, x))) for x in (sums_RC5, sums[0])
            )
            row |= _estimate(metric, *found)
            if group is not groups[0]:
                row |= _estimate(f"{metric}_difference", found[0] - base[0], found[1] - base[1])
        rows.append(row)
    return rows


def _sums(group: Group, task: str, cache: str, contexts: list[str]) -> torch.Tensor:
    """[R, C, 5] in fp64; zeros for a context that a run was not asked about."""
    places = {context: place for place, context in enumerate(contexts)}
    sums = torch.zeros(len(group.rows), len(contexts), len(SUMS), dtype=torch.float64)
    for run, rows in enumerate(group.rows):
        for row in rows:
            if (row["task"], row["cache"]) == (task, cache):
                exact = row["num_correct"] == row["num_tokens"]
                scores = [1, exact, row["num_tokens"], row["num_correct"], row["nll"]]
                sums[run, places[row["context"]]] += torch.tensor(scores, dtype=torch.float64)
    return sums


def _bootstrap_weights(num_runs: int, num_contexts: int, seed: int) -> torch.Tensor:
    """How often each run and context is drawn: [B, R, C] in fp64, the same for equal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def times_drawn(count: int) -> torch.Tensor:
        drawn = torch.randint(count, (NUM_SAMPLES, count), generator=generator)
        return torch.zeros(NUM_SAMPLES, count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones_like(drawn, dtype=torch.float64)
        )

    return times_drawn(num_runs)[:, :, None] * times_drawn(num_contexts)[:, None]


def _estimate(name: str, value: torch.Tensor, samples_B: torch.Tensor) -> dict[str, float]:
    # If runs were asked about different contexts, a sample may contain none of a run's contexts.
    low, high = torch.nanquantile(samples_B, torch.tensor(TAILS, dtype=torch.float64)).tolist()
    return {name: value.item(), f"{name}_low": low, f"{name}_high": high}


def markdown_table(rows: list[dict]) -> str:
    """One line for each task and cache: for each group the metrics with intervals, then the differences."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    columns = [f"{group}: {' / '.join(HEADINGS.values())}" for group in groups]
    columns += [f"{group} − {groups[0]}: {' / '.join(HEADINGS.values())}" for group in groups[1:]]
    lines = [f"| task | cache | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        if row["group"] == groups[0]:
            alike = [r for r in rows if (r["task"], r["cache"]) == (row["task"], row["cache"])]
            cells = [" / ".join(_cell(r, metric) for metric in METRICS) for r in alike]
            cells += [" / ".join(_cell(r, f"{metric}_difference", "+") for metric in METRICS) for r in alike[1:]]
            factor = "" if row["retention"] == 1 else f", {factor_name([row['cache_factor']])} smaller"
            task = f"{row['task']} ({row['num_questions']} questions)"
            lines.append(f"| {task} | {row['cache']}{factor} | {' | '.join(cells)} |")
    runs = f"{rows[0]['num_runs']} run{'s' * (rows[0]['num_runs'] > 1)} of each"
    lines.append("")
    lines.append(
        f"Mean over {runs}; in brackets 95 % intervals of a bootstrap over contexts and runs, for differences paired. "
        "nll is in nats an answer token."
    )
    return "\n".join(lines)


def _cell(row: dict, name: str, sign: str = "") -> str:
    digits = 2 if name.startswith("nll") else 1
    value, low, high = (format(row[name + end], f"{sign}.{digits}f") for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def write_csv(rows: list[dict], path: Path) -> None:
    """Writes all numbers of `compare`: a line for each task, cache and group."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise LRSAError(f"{path} cannot be written: {error.strerror}.") from error


def draw(rows: list[dict], path: Path, metric: str = "token_accuracy") -> None:
    """Writes a PNG: a panel for each task, with the metric of each group and its interval for each cache."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    caches = caches_in_order(rows)
    labels = [f"{name}, {factor_name(row['cache_factor'] for row in rows if row['cache'] == name)}" for name in caches]
    across = min(3, len(tasks))
    down = math.ceil(len(tasks) / across)
    figure = new_figure(2.8 + 3.0 * across, 1.2 + down * (0.7 + 0.42 * len(caches)))
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        _draw_task(panel, [row for row in rows if row["task"] == task], caches, metric)
        panel.set_title(task, fontsize=LABEL)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    panels[0].set_yticks(range(len(caches)), labels)
    panels[0].invert_yaxis()
    figure.supxlabel(f"{AXES[metric]}, with 95 % intervals", fontsize=LABEL)
    from matplotlib.lines import Line2D

    groups = list(dict.fromkeys(row["group"] for row in rows))
    handles = [Line2D([], [], color=GREY, linestyle="", marker=marker, markersize=6) for _, marker in _marked(groups)]
    figure.legend(handles, groups, fontsize=TICK, frameon=False, loc="outside upper left", ncols=4)
    save_figure(figure, path)


def _marked(groups: list[str]) -> list[tuple[str, str]]:
    return [(group, MARKERS[number % len(MARKERS)]) for number, group in enumerate(groups)]


def _draw_task(panel: "Axes", rows: list[dict], caches: list[str], metric: str) -> None:
    groups, colors = list(dict.fromkeys(row["group"] for row in rows)), cache_colors(caches)
    for number, (group, marker) in enumerate(_marked(groups)):
        mine = [row for row in rows if row["group"] == group]
        heights = [caches.index(row["cache"]) + 0.24 * (number - (len(groups) - 1) / 2) for row in mine]
        ends = [[max(0.0, s * (r[metric] - r[metric + end])) for r in mine] for s, end in ((1, "_low"), (-1, "_high"))]
        for row, height, low, high in zip(mine, heights, *ends, strict=True):
            color = colors[row["cache"]]
            panel.errorbar(
                [row[metric]], [height], xerr=[[low], [high]], fmt=marker, color=color, markersize=6, capsize=2.5
            )
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.tick_params(labelsize=TICK)
