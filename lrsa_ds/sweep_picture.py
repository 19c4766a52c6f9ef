"""The picture of a sweep: score and step time of its jobs over each swept key."""

import math
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_ds.labels import factor_name, retention_name
from lrsa_ds.pictures import GREY, LABEL, PALETTE, TICK, TITLE, cache_colors, new_figure, save_figure
from lrsa_ds.sweep import as_number, job_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RETENTION = "attention.retention"
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_sweep(rows: list[dict], path: Path, title: str) -> None:
    """Score and step time with 95 % intervals over each swept key, a line for each combination of the other keys.

    Jobs of one cache have its colour in all pictures, lines are told apart by their markers. Without a swept retention
    each line has a colour.

    Args:
        rows: `lrsa_ds.sweep.results`.

    Raises:
        LRSAError: `path` cannot be written.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row["swept"]))
    figure = new_figure(max(6.4, 4.2 * len(keys)), 6.6)
    figure.suptitle(f"{title}, with 95 % intervals", fontsize=TITLE, x=0.01, ha="left")
    panels = figure.subplots(2, len(keys), squeeze=False, sharex="col", sharey="row")
    factors = factor_name(row.get("cache_factor") for row in rows)
    panels[0, 0].set_ylabel(f"exact answers, %\n(cache {factors} smaller)", fontsize=LABEL)
    panels[1, 0].set_ylabel("median seconds a step", fontsize=LABEL)
    panels[0, 0].set_ylim(-4, 104)
    # From 0, with room above: matplotlib's margin is a share of the range of the times, which may be tiny.
    slowest = max((top for row in rows if (top := _top(row, "step_seconds")) > 0), default=1.0)
    panels[1, 0].set_ylim(0, 1.1 * slowest)
    for column, key in enumerate(keys):
        values = sorted({row["swept"].get(key, "-") for row in rows}, key=as_number)
        lines: dict[str, list[dict]] = {}
        for row in rows:
            others = {k: v for k, v in row["swept"].items() if k != key}
            lines.setdefault(job_name(others) if others else "", []).append(row)
        for panel, name in zip(panels[:, column], ("score", "step_seconds"), strict=True):
            _draw_lines(panel, lines, _colors(rows, lines), key, values, name)
        panels[1, column].set_xticks(range(len(values)), values)
        panels[1, column].set_xlabel(key, fontsize=LABEL)
        if any(lines):
            panels[0, column].legend(fontsize=TICK, frameon=False)
    save_figure(figure, path)


def _colors(rows: list[dict], lines: dict[str, list[dict]]) -> dict[str, str]:
    """Of each job, by its name: that of its cache, or of its line if no retention is swept."""
    caches = {job_name(row["swept"]): cache for row in rows if (cache := _cache(row))}
    if caches:
        known = cache_colors(sorted(set(caches.values())))
        return {job: known[cache] for job, cache in caches.items()}
    of_lines = zip(lines.values(), cycle(PALETTE), strict=False)
    return {job_name(row["swept"]): color for mine, color in of_lines for row in mine}


def _cache(row: dict) -> str | None:
    """The name of a job's cache in all pictures; a list of retentions, used in turn, is its own name."""
    written = row["swept"].get(RETENTION)
    try:
        return None if written is None else retention_name(float(written))
    except ValueError:
        return written


def _draw_lines(
    panel: "Axes", lines: dict[str, list[dict]], colors: dict[str, str], key: str, values: list[str], name: str
) -> None:
    for number, (label, mine) in enumerate(lines.items()):
        marker, shift = MARKERS[number % len(MARKERS)], 0.05 * (number - (len(lines) - 1) / 2)
        mine = sorted(mine, key=lambda row: values.index(row["swept"].get(key, "-")))
        places = [values.index(row["swept"].get(key, "-")) + shift for row in mine]  # intervals beside each other
        own = [colors.get(job_name(row["swept"]), GREY) for row in mine]
        color = own[0] if len(set(own)) == 1 else GREY
        panel.plot(places, [row.get(name, math.nan) for row in mine], color=color, linewidth=1.5, alpha=0.8)
        panel.plot([], [], color=color, linewidth=1.5, marker=marker, markersize=5.5, label=label)  # for the legend
        for place, row, of_point in zip(places, mine, own, strict=True):
            value = row.get(name, math.nan)
            ends = [[max(0.0, value - _end(row, name, "low"))], [max(0.0, _end(row, name, "high") - value)]]
            panel.errorbar([place], [value], yerr=ends, color=of_point, marker=marker, markersize=5.5, capsize=2.5)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.tick_params(labelsize=TICK)
    panel.spines[["top", "right"]].set_visible(False)


def _end(row: dict, name: str, end: str) -> float:
    """Of the interval of a figure; the figure itself if there is none."""
    found = row.get(f"{name}_{end}", math.nan)
    return row.get(name, math.nan) if math.isnan(found) else found


def _top(row: dict, name: str) -> float:
    return max(row.get(name, 0.0), _end(row, name, "high"))
