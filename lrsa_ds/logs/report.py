"""The evaluations of a run as a table for the terminal and as a picture; rows are those of `lrsa_ds.train.scoring`."""

import math
import textwrap
from pathlib import Path

from lrsa_ds.intervals import interval_of
from lrsa_ds.labels import SMALLER, cache_of, cache_tick, caches_in_order, factor_name, is_dense_cache
from lrsa_ds.pictures import GREY, LABEL, TICK, TITLE, cache_colors, new_figure, save_figure

COLUMNS = 100  # of a line of the table, unless the name of a task alone is longer
PANELS_PER_LINE = 4
TITLE_COLUMNS = 30  # of a panel's title
METRICS = {"exact_match": "exact %", "token_accuracy": "tokens %"}
CELL = 11  # of "100.0→100.0"
LEGEND = """cache: the share of each partition that is kept; dense: everything is
smaller: {smaller} at the end of an example
exact %: answers of which every token is right; tokens %: tokens of the answers that are right"""
LAYERED = "6 dense + 24 window: of the layers, 6 keep everything and 24 nothing but sink and window"
UNCOMPRESSED = "1.00x: the examples are too short for this cache to drop anything"


def evaluation_table(rows: list[dict]) -> str:
    """Scores in percent, one line per cache and one pair of columns per task: "before → after", or what there is.

    Args:
        rows: `when` ("before", "step N" or "after"; the first and the last are shown), `task`, `cache` (its name),
            `retention`, `cache_factor` (how many times smaller the cache was), `exact_match` and `token_accuracy` in
            percent, `num_examples`.

    Returns:
        Lines of at most `COLUMNS` columns; tasks that do not fit go below each other. "-" is a score that was not
        taken.
    """
    blocks: list[list[str]] = [[]]
    label_width = len(_labels(rows)[-1])
    for task in _in_order(rows, "task"):
        if blocks[-1] and label_width + sum(3 + _width(t) for t in (*blocks[-1], task)) > COLUMNS:
            blocks.append([])
        blocks[-1].append(task)
    tables = ["\n".join(_block(rows, tasks)) for tasks in blocks]
    legend = [" → ".join(_phrase(when) for when in _times(rows)), LEGEND.format(smaller=SMALLER)]
    if any(" + " in cache for cache in caches_in_order(rows)):
        legend.append(LAYERED)
    if any(row.get("cache_factor") == 1 and row["retention"] < 1 for row in rows):
        legend.append(UNCOMPRESSED)
    return "\n\n".join([*tables, "\n".join(legend)])


def _width(task: str) -> int:
    return max(2 * CELL + 2, len(task))


def _labels(rows: list[dict]) -> list[str]:
    """The first columns of the lines of a block: two of the header's lines, then a line for each cache."""
    lines = [("cache", "smaller")]
    for cache in caches_in_order(rows):
        mine = [row for row in rows if cache_of(row) == cache]
        is_dense = all(map(is_dense_cache, mine))
        lines.append((cache, "" if is_dense else factor_name(row.get("cache_factor") for row in mine)))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    labels = [f"{name:<{widths[0]}}  {factor:>{widths[1]}}" for name, factor in lines]
    return [" " * len(labels[0])] * 2 + labels


def _block(rows: list[dict], tasks: list[str]) -> list[str]:
    columns = []
    for task in tasks:
        count = f"{_num_examples(rows, task)} examples"
        lines = [task, count, "  ".join(f"{label:>{CELL}}" for label in METRICS.values())]
        for cache in caches_in_order(rows):
            lines.append("  ".join(f"{_cell(rows, task, cache, name):>{CELL}}" for name in METRICS))
        width = _width(task)
        columns.append([f"{line:^{width}}" for line in lines])
    return [" │ ".join(line).rstrip() for line in zip(_labels(rows), *columns, strict=True)]


def _cell(rows: list[dict], task: str, cache: str, metric: str) -> str:
    scores = []
    for when in _times(rows):
        found = [r for r in rows if (r["when"], r["task"], cache_of(r)) == (when, task, cache)]
        value = found[-1].get(metric) if found else None
        scores.append("-" if value is None or math.isnan(value) else f"{value:.1f}")
    return "→".join(f"{score:>5}" for score in scores)


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


def draw_evaluation(rows: list[dict], path: Path, title: str) -> None:
    """Writes a PNG of the scores in percent over the caches, one panel per task.

    All shares have 95 % intervals, whose unit is the example; a cache has the same colour in every picture.

    Args:
        rows: as for `evaluation_table`.

    Raises:
        LRSAError: `path` cannot be written.
    """
    tasks = _in_order(rows, "task")
    num_columns = min(len(tasks), PANELS_PER_LINE)
    num_lines = -(-len(tasks) // num_columns)
    legend = _legend(_times(rows))
    legend_columns = 4 if num_columns > 2 else 2
    # Labels of caches are wide; a panel has room for each.
    width = max(3.3, 0.95 * len(caches_in_order(rows)) + 0.6)
    height = 0.9 + 3.0 * num_lines + 0.3 * -(-len(legend) // legend_columns)
    figure = new_figure(max(6.4, width * num_columns), height)
    panels = figure.subplots(num_lines, num_columns, sharey=True, squeeze=False)
    for number, panel in enumerate(panels.flat):
        if number < len(tasks):
            _draw_panel(panel, rows, tasks[number])
            if number + num_columns >= len(tasks):
                panel.set_xlabel(f"cache\n({SMALLER})", fontsize=LABEL)
        else:
            panel.set_visible(False)
    figure.suptitle(title, fontsize=TITLE, x=0.01, ha="left")
    for panel in panels[:, 0]:
        panel.set_ylabel("% right, 95 % intervals", fontsize=LABEL)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=TICK, handlelength=2.4
    )
    save_figure(figure, path)


def _is_start(when: str, times: list[str]) -> bool:
    return when == "before" or (len(times) == 2 and when == times[0])


def _style(is_start: bool, metric: str) -> dict:
    """Open markers for the start, filled ones for the end; their colour is that of the cache."""
    style = {"linestyle": "--" if is_start else "-", "fillstyle": "none" if is_start else "full"}
    if metric == "exact_match":
        return style | {"marker": "o", "markersize": 7.5, "linewidth": 1.3}
    return style | {"marker": "D", "markersize": 4.5, "linewidth": 0.8}


def _legend(times: list[str]) -> list:
    from matplotlib.lines import Line2D

    names = {"exact_match": "exact answers", "token_accuracy": "answer tokens"}
    return [
        Line2D([], [], color=GREY, **_style(_is_start(w, times), m), label=f"{name}, {_phrase(w)}")
        for m, name in names.items()
        for w in times
    ]


def _draw_panel(panel, rows: list[dict], task: str) -> None:
    caches = caches_in_order(rows)  # the dense cache on the left, as in the table's first line
    colors, times = cache_colors(caches), _times(rows)
    for when in times:
        mine = [r for r in rows if (r["when"], r["task"]) == (when, task)]
        mine.sort(key=lambda row: caches.index(cache_of(row)))
        for metric in ("token_accuracy", "exact_match"):
            style = _style(_is_start(when, times), metric)
            # Slightly beside each other, so that intervals do not hide each other.
            shift = (0.09 if metric == "token_accuracy" else -0.09) + (0.03 if when == times[-1] else -0.03)
            places = [caches.index(cache_of(row)) + shift for row in mine]
            scores = [row[metric] for row in mine]
            panel.plot(places, scores, color=GREY, alpha=0.6, **style | {"marker": ""})
            for place, score, row in zip(places, scores, mine, strict=True):
                color = colors[cache_of(row)]
                panel.plot([place], [score], color=color, **style)
                if not math.isnan(score):
                    ends = interval_of(row, metric)
                    panel.vlines(place, *ends, color=color, linewidth=1.0, linestyle=style["linestyle"])
    mine = [row for row in rows if row["task"] == task]
    panel.set_xticks(range(len(caches)), [cache_tick(mine, cache) for cache in caches])
    panel.set_xlim(-0.3, len(caches) - 0.7)  # room at both ends for the markers
    panel.set_ylim(-4, 104)
    panel.set_yticks(range(0, 101, 25))
    title = textwrap.fill(f"{task} ({_num_examples(rows, task)} examples)", TITLE_COLUMNS)
    panel.set_title(title, fontsize=LABEL)
    panel.tick_params(labelsize=TICK)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
