"""The summary of an evaluation as a table for the terminal, and as figures."""

import math
import textwrap
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lrsa_ds.evaluate.results import cache_name, caches_of, measured_factor, wilson
from lrsa_ds.intervals import mean_interval
from lrsa_ds.labels import SMALLER, cache_of, cache_tick, caches_in_order, factor_name, retention_name
from lrsa_ds.pictures import GREY, LABEL, TICK, TITLE, cache_colors, new_figure, save_figure

CACHES_PER_BLOCK = 4
WIDTH, TITLE_WIDTH = 18, 28  # of the columns of the table and of its first column: lines have at most 100 characters
MARKERS = {"dense": "s", "chunked": "o", "after": "^"}  # of a cache by how it is filled; its colour says which it is


CACHES = {
    "dense": "holds everything",
    "chunked": "compressed during prefilling, chunk by chunk",
    "after": "prefilled densely, compressed afterwards",
}
METRICS = {
    "exact": "answers that are right, ignoring case, punctuation, articles and spaces",
    "f1": "F1 of the words of the answer",
    "recall": "right answers that the output contains",
    "partial": "longest part of the answer in the output, relative to its length",
    "qa_f1": "LongBench's: F1 of the words of the answer",
    "qa_f1_zh": "LongBench's: F1 of Chinese words",
    "qa_f1_first_line": "LongBench's: F1 of the words of the answer, in the first line of the output",
    "rouge": "LongBench's: ROUGE-L",
    "rouge_zh": "LongBench's: ROUGE-L of Chinese words",
    "rouge_first_line": "LongBench's: ROUGE-L of the first line of the output",
    "classification": "LongBench's: 1 over the labels in the first line, if the right one is among them",
    "count": "LongBench's: share of the numbers in the output that equal the answer",
    "retrieval": "LongBench's: share of the numbers in the output that are the right paragraph",
    "retrieval_zh": "LongBench's: share of the numbers in the output that are the right Chinese paragraph",
    "code_sim": "LongBench's: similarity of the first line of code and the answer, in whole percent",
    "string_match_all": "RULER's: share of the right answers that the output contains",
    "string_match_part": "RULER's: samples whose output contains one of the right answers",
    "first_token": "samples whose first generated token equals that of the dense cache",
    "nll": "negative log-likelihood of a token of the text, in nats",
}
LAYERED = ["such as 6 dense + 24 window: 6 layers keep everything, 24 layers only sink and window"]
UNCOMPRESSED = "1.00x: too short for this cache to drop anything; such samples have no first_token"


def results_table(rows: list[dict]) -> str:
    """Means with 95 % intervals: a block for each length, a line for each task and metric, a column for each cache.

    Args:
        rows: from `results.summary`.
    """
    blocks = []
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length]
        caches = caches_of(mine)
        for start in range(0, len(caches), CACHES_PER_BLOCK):
            blocks.append("\n".join(_block(mine, length, caches[start : start + CACHES_PER_BLOCK])))
    return "\n\n".join([*blocks, "\n".join(_legend(rows))])


def _legend(rows: list[dict]) -> list[str]:
    """Explanations of the words in a table."""
    prefills, metrics = ({row[name] for row in rows} for name in ("prefill", "metric"))
    lines = ["percent (nll: nats), with 95 % intervals; (n): samples"]
    lines += [f"{name}: {meaning}" for name, meaning in CACHES.items() if name in prefills]
    if prefills != {"dense"}:
        lines += [
            "such as 1/8: the share of each partition that is kept",
            *LAYERED[: any(row["layers"] for row in rows)],
            f"smaller: {SMALLER} when the answer begins (nll: at the end of the text)",
        ]
    if any(row.get("cache_bytes") for row in rows):
        lines.append("cache MB, tokens/s: memory of the cache when the answer begins, and speed of decoding")
    if any(row["retention"] < 1 and row["cache_factor"] == 1 for row in rows):
        lines.append(UNCOMPRESSED)
    return lines + [f"{name}: {meaning}" for name, meaning in METRICS.items() if name in metrics]


def _block(rows: list[dict], length: int, caches: list[tuple[str, float, str]]) -> list[str]:
    names = [cache_name(*cache) for cache in caches]
    headings = [textwrap.wrap(name, WIDTH - 2) for name in names]  # caches whose layers differ have long names
    height = max(map(len, headings))
    cells = [[""] * (height - len(heading)) + heading for heading in headings]
    titles = [""] * (height - 1) + [f"{length:,} tokens"]
    lines = [
        f"{title:<{TITLE_WIDTH}}" + "".join(f"{cell[line]:>{WIDTH}}" for cell in cells)
        for line, title in enumerate(titles)
    ]
    if set(names) != {"dense"}:
        factors = [factor_name(row["cache_factor"] for row in rows if row["cache"] == name) for name in names]
        cells = ["" if name == "dense" else factor for name, factor in zip(names, factors, strict=True)]
        lines.append(f"{'smaller':<{TITLE_WIDTH}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    lines += _costs(rows, names)
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        found = {row["cache"]: row for row in rows if (row["task"], row["metric"]) == (task, metric)}
        count = "/".join(dict.fromkeys(str(found[name]["num_samples"]) for name in names if name in found))
        if count:  # some tasks have only some of the caches
            title = f"{task} {metric} ({count})"
            if len(title) > TITLE_WIDTH:  # a name is never cut
                lines += [task] if task not in lines else []
                title = f"  {metric} ({count})"
            lines.append(f"{title:<{TITLE_WIDTH}}" + "".join(f"{_cell(found.get(name)):>{WIDTH}}" for name in names))
    return lines


def _costs(rows: list[dict], names: list[str]) -> list[str]:
    """A line with the memory of each cache, and one with the speed of decoding, if they were measured."""
    lines = []
    for title, key, unit in (("cache MB", "cache_bytes", 1e6), ("tokens/s", "tokens_per_s", 1)):
        given = [[row[key] for row in rows if row["cache"] == name and row.get(key) is not None] for name in names]
        cells = [f"{sum(values) / len(values) / unit:,.1f}" if values else "-" for values in given]
        if any(given):
            lines.append(f"{title:<{TITLE_WIDTH}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    return lines


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    digits = 3 if row["metric"] == "nll" else 1
    if math.isnan(row["low"]):
        return f"{row['mean']:.{digits}f}"
    ends = f"{row['low']:.2f}–{row['high']:.2f}" if row["metric"] == "nll" else f"{row['low']:.0f}–{row['high']:.0f}"
    return f"{row['mean']:.{digits}f} ({ends})"


def draw_results(rows: list[dict], samples: list[dict], directory: Path, title: str) -> dict[str, Path]:
    """Writes the figures that the results allow; returns them by name.

    "scores_<length>": the first metric of each task over the share of the cache kept; "needles": by depth and length;
    "perplexity": by position.

    Args:
        rows: from `results.summary`; samples: the rows of `results.jsonl`.
    """
    pictures = {}
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length and row["metric"] not in ("nll", "first_token")]
        if mine:
            figure = _scores(mine, f"{title}: answers from {length:,} tokens")
            pictures[f"scores_{length}"] = _save(figure, directory / f"scores_{length}.png")
    if any("depth" in sample for sample in samples):
        pictures["needles"] = _save(_needles(samples, f"{title}: by depth and length"), directory / "needles.png")
    if any("nll_by_position" in sample for sample in samples):
        pictures["perplexity"] = _save(_perplexity(samples, f"{title}: by position"), directory / "perplexity.png")
    return pictures


def _save(figure: Figure, path: Path) -> Path:
    save_figure(figure, path)
    return path


def _figure(num_lines: int, num_columns: int, size: tuple[float, float], title: str, **shared):
    figure = new_figure(max(6.4, size[0] * num_columns), 0.9 + size[1] * num_lines)
    figure.suptitle(title, fontsize=TITLE, x=0.01, ha="left")
    return figure, figure.subplots(num_lines, num_columns, squeeze=False, **shared)


def _scores(rows: list[dict], title: str) -> Figure:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    num_columns = min(4, len(tasks))
    # Caches are ordered by retention, however they are filled; caches that hold everything share one place.
    rows = [row | {"cache": row["layers"] or retention_name(row["retention"])} for row in rows]
    places = caches_in_order(rows)
    size = (max(3.3, 0.95 * len(places) + 0.6), 3.0)
    figure, panels = _figure(-(-len(tasks) // num_columns), num_columns, size, title, sharey=True)
    handles: dict[str, Line2D] = {}
    for number, panel in enumerate(panels.flat):
        if number >= len(tasks):
            panel.set_visible(False)
            continue
        metric = next(row["metric"] for row in rows if row["task"] == tasks[number])
        mine = [row for row in rows if (row["task"], row["metric"]) == (tasks[number], metric)]
        for prefill in MARKERS:
            line = [row for row in mine if row["prefill"] == prefill]
            line.sort(key=lambda row: places.index(cache_of(row)))
            if line:
                _errorbars(panel, line, places, prefill)
                handles[prefill] = Line2D([], [], color=GREY, marker=MARKERS[prefill], linewidth=1.2)
        panel.set_xticks(range(len(places)), [cache_tick(mine, place) for place in places])
        panel.set_xlim(-0.4, len(places) - 0.6)
        panel.set_ylim(-4, 104)
        panel.set_title(textwrap.fill(f"{tasks[number]} ({metric})", 32), fontsize=LABEL)
        panel.tick_params(labelsize=TICK)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if number + num_columns >= len(tasks):
            panel.set_xlabel(f"cache\n({SMALLER})", fontsize=LABEL)
    for panel in panels[:, 0]:
        panel.set_ylabel("%, 95 % intervals", fontsize=LABEL)
    names = [f"{prefill}: {CACHES[prefill]}" for prefill in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=1, frameon=False, fontsize=TICK)
    return figure


def _errorbars(panel, line: list[dict], places: list[str], prefill: str) -> None:
    # Points are slightly shifted, so that equal scores do not hide each other.
    shift, colors = 0.08 * (list(MARKERS).index(prefill) - 1), cache_colors(places)
    points = [(places.index(cache_of(row)) + shift, row["mean"]) for row in line]
    panel.plot(*zip(*points, strict=True), color=GREY, linewidth=1.2, alpha=0.6)
    for (place, mean), row in zip(points, line, strict=True):
        ends = [[max(0.0, mean - row["low"])], [max(0.0, row["high"] - mean)]]
        panel.errorbar(
            [place], [mean], yerr=ends, color=colors[cache_of(row)], marker=MARKERS[prefill], markersize=7, capsize=3,
            elinewidth=1.2,
        )  # fmt: skip


def _cache(sample: dict) -> tuple[str, float, str]:
    return sample["prefill"], sample["retention"], sample["layers"]


def _title(samples: list[dict], cache: tuple[str, float, str]) -> str:
    """The name of a cache, and how many times smaller it was for these samples."""
    mine = [s for s in samples if _cache(s) == cache]
    lengths = sorted({sample["length"] for sample in mine})
    factors = [measured_factor([s for s in mine if s["length"] == length]) for length in lengths]
    name = cache_name(*cache)
    return name if cache[0] == "dense" else f"{name} ({factor_name(factors)})"


def _needles(samples: list[dict], title: str) -> Figure:
    samples = [sample for sample in samples if "depth" in sample]
    tasks = list(dict.fromkeys(sample["task"] for sample in samples))
    caches = caches_of(samples)
    lengths = sorted({sample["length"] for sample in samples})
    depths = sorted({sample["depth"] for sample in samples})
    size = (max(2.8, 0.85 * len(lengths) + 1.4), max(2.3, 0.52 * len(depths) + 1.3))
    figure, panels = _figure(len(tasks), len(caches), size, title, sharex=True, sharey=True)
    counts = Counter((s["task"], _cache(s), s["length"], s["depth"]) for s in samples)
    shown = f"{title}\nmean and 95 % interval of {_range(counts.values())} a cell"
    figure.suptitle(shown, fontsize=TITLE, x=0.01, ha="left")
    image = None
    for task, line in zip(tasks, panels, strict=True):
        for cache, panel in zip(caches, line, strict=True):
            grid = [[_in_cell(samples, task, cache, n, depth) for n in lengths] for depth in depths]
            # Told apart by brightness, so by colour-blind readers too.
            means = [[mean for mean, *_ in cells] for cells in grid]
            image = panel.imshow(means, vmin=0, vmax=100, cmap="cividis", aspect="auto")
            for y, cells in enumerate(grid):
                for x, (mean, low, high) in enumerate(cells):
                    if not math.isnan(mean):
                        look: dict[str, Any] = dict(ha="center", color="white" if mean < 55 else "black")
                        panel.text(x, y, f"{mean:.0f}", va="bottom", fontsize=LABEL, fontweight="bold", **look)
                        panel.text(x, y + 0.06, f"{low:.0f}–{high:.0f}", va="top", fontsize=TICK, **look)
            title = _title([sample for sample in samples if sample["task"] == task], cache)
            panel.set_title(f"{textwrap.fill(task, 26)}\n{textwrap.fill(title, 26)}", fontsize=TICK)
            panel.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=TICK)
            panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=TICK)
    figure.supxlabel("tokens", fontsize=LABEL)
    figure.supylabel("depth of the fact", fontsize=LABEL)
    assert image is not None  # there is a task, and a cache
    figure.colorbar(image, ax=panels, shrink=0.8, label="score, %").ax.tick_params(labelsize=TICK)
    return figure


def _range(counts: Collection[int]) -> str:
    """Such as "1 sample" or "2–3 samples"."""
    ends = sorted({min(counts), max(counts)})
    return f"{'–'.join(map(str, ends))} sample{'s' * (ends != [1])}"


def _in_cell(
    samples: list[dict], task: str, cache: tuple[str, float, str], length: int, depth: float
) -> tuple[float, float, float]:
    """The mean score of a cell and its interval; NaN for a cell without samples."""
    mine = [s for s in samples if (s["task"], _cache(s), s["length"], s["depth"]) == (task, cache, length, depth)]
    scores = [next(iter(s["scores"].values())) for s in mine]
    return wilson(scores) if scores else (math.nan, math.nan, math.nan)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _perplexity(samples: list[dict], title: str) -> Figure:
    samples = [sample for sample in samples if "nll_by_position" in sample]
    lengths = sorted({sample["length"] for sample in samples})
    figure, panels = _figure(1, len(lengths), (4.6, 3.4), title, sharey=True)
    styles = {"dense": "-", "chunked": "-", "after": "--"}
    for length, panel in zip(lengths, panels[0], strict=True):
        mine = [sample for sample in samples if sample["length"] == length]
        named = {cache: cache[2] or retention_name(cache[1]) for cache in caches_of(mine)}
        colors = cache_colors(list(dict.fromkeys(named.values())))
        for cache, name in named.items():
            curves = [s["nll_by_position"] for s in mine if _cache(s) == cache]
            mean, low, high = zip(*(mean_interval(values) for values in zip(*curves, strict=True)), strict=True)
            ends = [length * (i + 1) / len(mean) for i in range(len(mean))]
            label = _title(mine, cache)
            panel.plot(ends, mean, color=colors[name], linestyle=styles[cache[0]], linewidth=1.8, label=label)
            if len(curves) > 1:  # 95 % intervals of the mean over the texts
                panel.fill_between(ends, low, high, color=colors[name], alpha=0.15, linewidth=0)
        panel.legend(fontsize=TICK, frameon=False)  # each has its own: the factors depend on the length
        panel.set_xlabel("position (tokens)", fontsize=LABEL)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.xaxis.set_major_locator(MaxNLocator(5))  # such numbers are long
        panel.set_title(f"{length:,} tokens ({len({s['index'] for s in mine})} texts)", fontsize=LABEL)
        panel.tick_params(labelsize=TICK)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("nats per token, 95 % intervals", fontsize=LABEL)
    return figure
