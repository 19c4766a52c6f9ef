"""The results of telemetry: a sentence, settings to use, rows, and a figure."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from lrsa_ds.errors import LRSAError
from lrsa_ds.labels import retention_name
from lrsa_ds.layer_ranges import written_layers
from lrsa_ds.logs.journal import without_nan
from lrsa_ds.logs.metrics import RunLogger
from lrsa_ds.pictures import BLACK, GREY, LABEL, TICK, TITLE, cache_colors, new_figure, save_figure
from lrsa_ds.telemetry.measure import LayerLoss, Telemetry

MOST_NAMED = 5  # maximum number of layers in the sentence
PANELS = (  # of the figure: the name of the field, and the title
    ("dropped_mass", "attention mass on\ndropped tokens (%)"),
    ("answer_kept", "answer's own tokens\nthat are kept (%)"),
)


def report_telemetry(found: Telemetry, when: str, step: int, directory: Path, run_name: str, logger: RunLogger) -> None:
    """Prints the results, and writes them to the directory and the logs; for one rank.

    Args:
        when: "before" or "after" training, or another word; part of the names of the files.

    Raises:
        LRSAError: a file cannot be written.
    """
    for line in sentences(found):
        logger.message(line)
    file, picture = (directory / f"telemetry_{when}.{kind}" for kind in ("json", "png"))
    try:
        file.write_text(json.dumps(without_nan(asdict(found)), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise LRSAError(f"{file} cannot be written: {error.strerror}.") from error
    cache = f"retention {retention_name(found.retention)}, {found.num_examples} examples"
    draw(found, picture, f"{run_name}, {when}: what answers lose by layer\n({cache})")
    logger.telemetry([{"when": when, "step": step} | row for row in rows(found)], picture)


def sentences(found: Telemetry) -> list[str]:
    """The layers that lose most, the loss of all layers together, and the settings of the greedy choice."""
    cache = f"retention {retention_name(found.retention)}"
    worst = sorted(found.layers, key=lambda layer: -layer.nll_increase)[:MOST_NAMED]
    named = ", ".join(f"{layer.layer} (+{layer.nll_increase:.3f})" for layer in worst if layer.nll_increase > 0)
    lose = (
        f"layers that lose most when they alone are compressed: {named}" if named else "no layer alone loses anything"
    )
    counted = f"{found.num_answer_tokens:,} answer tokens of {found.num_examples} examples"
    lines = [
        f"telemetry: {lose}; nats per answer token at {cache}, all layers together "
        f"{found.nll_compressed - found.nll_dense:+.3f} on {found.nll_dense:.3f}, over {counted}"
    ]
    chosen: list[int] = []
    for step in found.greedy:
        chosen.append(step.layer)
        lines.append(
            f"telemetry: {step.nll:.3f} nats with dense layers {', '.join(map(str, sorted(chosen)))}: "
            f"'attention.layers={layers_setting(chosen, len(found.layers), found.retention)}'"
        )
    if chosen:
        lines.append(
            "telemetry: one model for several caches, which training uses in turn: "
            f"'attention.layers={turns_setting(chosen, len(found.layers), found.retention)}'"
        )
    return lines


def layers_setting(dense: list[int], num_layers: int, retention: float) -> str:
    """The value of `attention.layers` that makes these layers dense and gives all others `retention`."""
    if len(dense) in (0, num_layers):
        return f"{{0-: {1.0 if dense else retention}}}"
    return f"{{{written_layers(dense)}: 1.0, rest: {retention}}}"


def turns_setting(order: list[int], num_layers: int, retention: float) -> str:
    """The list to train in turn: dense attention, then the first layers of the order dense, in thirds."""
    counts = dict.fromkeys(-(-len(order) * thirds // 3) for thirds in (3, 2, 1))
    turns = ["{0-: 1.0}", *(layers_setting(order[:count], num_layers, retention) for count in counts)]
    return f"[{', '.join(dict.fromkeys(turns))}]"


def rows(found: Telemetry) -> list[dict]:
    """Rows for `metrics.jsonl`: one per layer, with its place in the greedy choice, if any."""
    common = {name: value for name, value in asdict(found).items() if name not in ("layers", "greedy")}
    places = {step.layer: {"greedy_place": i, "greedy_nll": step.nll} for i, step in enumerate(found.greedy, start=1)}
    return [common | asdict(layer) | places.get(layer.layer, {}) for layer in found.layers]


def draw(found: Telemetry, path: Path, title: str) -> None:
    """Writes a PNG: two heat maps of layers and KV heads, and the loss of each layer, with its interval, next to them.

    Raises:
        LRSAError: `path` cannot be written.
    """
    num_layers, num_heads = len(found.layers), len(found.layers[0].dropped_mass)
    width = max(2.2, 0.5 * num_heads)
    figure = new_figure(2 * width + 5.0, max(3.8, 1.9 + 0.25 * num_layers))
    figure.suptitle(title, fontsize=TITLE, x=0.01, ha="left")
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[width, width, 2.6])
    for panel, (name, heading) in zip(panels, PANELS, strict=False):
        _draw_map(panel, [getattr(layer, name) or [math.nan] * num_heads for layer in found.layers], heading)
    name = retention_name(found.retention)
    _draw_increases(panels[2], found.layers, cache_colors([name])[name])
    every = max(1, -(-num_layers // 40))
    places = range(0, num_layers, every)
    panels[0].set_yticks(places, [str(found.layers[place].layer) for place in places])
    panels[0].set_ylabel("layer", fontsize=LABEL)
    for panel in panels:
        panel.tick_params(labelsize=TICK)
    save_figure(figure, path)


def _draw_map(panel, shares: list[list[float]], heading: str) -> None:
    """Shares of layers and heads in percent, as colours and numbers."""
    percent = [[100 * share for share in line] for line in shares]
    panel.imshow(percent, vmin=0, vmax=100, cmap="cividis", aspect="auto")  # ordered by brightness: colour-blind safe
    for y, line in enumerate(percent):
        for x, value in enumerate(line):
            text = "-" if math.isnan(value) else f"{value:.0f}"
            color = "white" if value < 55 else "black"
            panel.text(x, y, text, ha="center", va="center", fontsize=9, color="black" if text == "-" else color)
    panel.set_title(heading, fontsize=LABEL)
    panel.set_xticks(range(len(shares[0])))
    panel.set_xlabel("KV head", fontsize=LABEL)


def _draw_increases(panel, layers: list[LayerLoss], color: str) -> None:
    increases = [layer.nll_increase for layer in layers]
    panel.barh(range(len(layers)), increases, color=color, height=0.7)
    ends = [(layer.nll_increase_low, layer.nll_increase_high) for layer in layers]
    lengths = [[abs(end[side] - mean) for mean, end in zip(increases, ends, strict=True)] for side in (0, 1)]
    panel.errorbar(increases, range(len(layers)), xerr=lengths, fmt="none", ecolor=BLACK, elinewidth=1.0, capsize=2)
    panel.axvline(0, color=GREY, linewidth=0.8)
    panel.set_title("loss if this layer alone\nis compressed", fontsize=LABEL)
    panel.set_xlabel("nats per answer token above\ndense, 95 % intervals", fontsize=LABEL)
    panel.locator_params(axis="x", nbins=4)
    panel.grid(axis="x", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
