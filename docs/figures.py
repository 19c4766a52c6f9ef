"""The figures of the documentation, drawn from the code that they explain: `python docs/figures.py` writes them all.

Masks and lengths come from the partition table, kept tokens from the selection rule, stretches from the exchanges.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

from launch.cli.accelerator import register_resolver
from launch.cli.checkout import CONF, register_checkout
from launch.cli.schema import register_schema
from lrsa_ds import comparison
from lrsa_ds.attention.partition import num_held, partition_table
from lrsa_ds.attention.selection.lagkv import lag_scores
from lrsa_ds.attention.selection.select import select_kept
from lrsa_ds.config import TrainConfig, typed_config
from lrsa_ds.costs.plan import Estimate
from lrsa_ds.costs.settings import PlanConfig
from lrsa_ds.costs.traffic import pass_bytes
from lrsa_ds.labels import retention_name
from lrsa_ds.lrsa_config import LRSAConfig
from lrsa_ds.parallel.sequence.gather_kept import GATHER_KEPT
from lrsa_ds.parallel.sequence.head_groups import HEAD_GROUPS
from lrsa_ds.pictures import (
    BLACK,
    GREY,
    LABEL,
    OF_CACHE,
    ORANGE,
    PALETTE,
    SKY,
    TICK,
    VERMILION,
    new_figure,
    save_figure,
)
from lrsa_ds.train.forecast import job_and_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "pictures"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "2026-11-26-h100" / "answers.csv"
SMALL = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
NUM_TOKENS = 46
SINK, KEPT, WINDOW, DROPPED = ORANGE, VERMILION, SKY, "#e5e8ec"
RANKS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
# What the plan is asked for on the page of 131,072 tokens: a label, and the settings.
PLANS = {
    "1.5B, 1 GPU": ("+recipe=step_1b5",),
    "1.5B, 2 GPUs": ("+recipe=step_1b5", "gpus=2", "parallel.sp_size=2"),
    "8B, 4 GPUs, offload": ("+recipe=qa_128k", "model=llama_8b", "gpus=4", "parallel.sp_size=4"),
    "8B, 8 GPUs, offload": ("+recipe=qa_128k", "model=llama_8b", "gpus=8"),
    "8B, 8 GPUs": ("+recipe=qa_128k", "model=llama_8b", "gpus=8", "zero=stage3"),
    "8B, LoRA, 1 GPU": ("+recipe=lora_8b_1gpu", "model=llama_8b", "seq_len=131072", "memory=none"),
    "8B, LoRA, 1 GPU, memory=long": ("+recipe=lora_8b_1gpu", "model=llama_8b", "seq_len=131072", "memory=long"),
}


def keys_and_values(num_tokens: int, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values [1, G, N, D], alike in every run."""
    k, v = torch.randn(2, 1, num_heads, num_tokens, 16, generator=torch.Generator().manual_seed(3))
    return k, v


def seen_tokens(num_tokens: int, config: LRSAConfig) -> torch.Tensor:
    """What each query [N] sees of each token [N]: 0 nothing (later), 1 dropped, 2 window, 3 kept, 4 sink."""
    kept = select_kept(*keys_and_values(num_tokens, 1), config)[0, 0]
    table = partition_table((num_tokens,), config)
    # The token of each slot of the kept buffer: [sink | kept KV of partition 0 | ...].
    slots = torch.cat([torch.arange(config.sink_size), kept.flatten()])
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for query, (hist_lo, hist_hi, win_lo) in enumerate(zip(*(t.tolist() for t in table.intervals()), strict=True)):
        seen[query, :query] = 1
        seen[query, slots[hist_lo:hist_hi]] = 3
        seen[query, win_lo : query + 1] = 2
        seen[query, : min(config.sink_size, query + 1)] = 4
    return seen


def legend(panel: "Axes", entries: dict[str, str], **place) -> None:
    from matplotlib.patches import Patch

    panel.legend(
        handles=[
            Patch(facecolor=color, edgecolor="#8c959f", linewidth=0.5, label=name) for name, color in entries.items()
        ],
        fontsize=10,
        frameon=False,
        **place,
    )


def draw_mask() -> "Figure":
    from matplotlib.colors import ListedColormap

    seen = seen_tokens(NUM_TOKENS, SMALL)
    figure = new_figure(7.4, 4.9)
    panel = figure.subplots()
    colors = ListedColormap(["white", DROPPED, WINDOW, KEPT, SINK])
    panel.pcolormesh(seen.numpy(), cmap=colors, vmin=0, vmax=4, edgecolors="white", linewidth=0.6)
    panel.invert_yaxis()
    panel.set_aspect("equal")
    starts = [SMALL.sink_size + i * SMALL.lag_size for i in range(1 + (NUM_TOKENS - SMALL.sink_size) // SMALL.lag_size)]
    for start in starts:
        panel.axvline(start, color="#57606a", linewidth=0.7, linestyle=":")
    panel.set_xticks(starts, [str(start) for start in starts], fontsize=10)
    panel.set_yticks(starts, [str(start) for start in starts], fontsize=10)
    panel.set_xlabel("key (token of the past)", fontsize=11)
    panel.set_ylabel("query (token that attends)", fontsize=11)
    panel.set_title(
        f"Sink S = {SMALL.sink_size}, partitions of L = {SMALL.lag_size} tokens, K = {SMALL.num_kept} kept of each",
        fontsize=11,
    )
    entries = {"sink: always seen": SINK, "kept of a partition": KEPT, "window: all recent tokens": WINDOW}
    legend(panel, {**entries, "dropped: not in the cache": DROPPED}, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_partitions() -> "Figure":
    """Each chunk of queries: what it sees, from the partition table."""
    table = partition_table((NUM_TOKENS,), SMALL)
    figure = new_figure(8.2, 3.4)
    panel = figure.subplots()
    sink, lag, kept = SMALL.sink_size, SMALL.lag_size, SMALL.num_kept
    for row, chunk in enumerate(table.chunks):
        num_partitions = max(0, (chunk.hist_hi - chunk.hist_lo - sink) // kept)
        if num_partitions:
            panel.barh(row, sink, left=0, color=SINK, height=0.62)
        for p in range(num_partitions):
            panel.barh(row, lag, left=sink + p * lag, color=DROPPED, height=0.62)
            panel.text(
                sink + (p + 0.5) * lag, row, f"{kept} of {lag}", ha="center", va="center", fontsize=10, color=KEPT,
                weight="bold",
            )  # fmt: skip
        panel.barh(row, chunk.q_lo - chunk.win_lo, left=chunk.win_lo, color=WINDOW, height=0.62)
        panel.barh(
            row, chunk.q_hi - chunk.q_lo, left=chunk.q_lo, color=WINDOW, height=0.62, hatch="///", edgecolor="white"
        )
    panel.invert_yaxis()
    edges = [0, *(sink + i * lag for i in range(1 + (NUM_TOKENS - sink) // lag))]
    panel.set_xticks(edges, [str(edge) for edge in edges], fontsize=10)
    panel.set_yticks(range(len(table.chunks)), [f"queries {c.q_lo}–{c.q_hi - 1}" for c in table.chunks], fontsize=10)
    for edge in edges[1:]:
        panel.axvline(edge, color="#57606a", linewidth=0.7, linestyle=":")
    panel.set_xlim(0, NUM_TOKENS)
    panel.set_xlabel("token", fontsize=11)
    entries = {"sink": SINK, "partition: K kept": DROPPED, "window (hatched: the queries)": WINDOW}
    legend(panel, entries, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def draw_kept() -> "Figure":
    """The score of each token in two KV heads, and the tokens that are kept for it."""
    config, num_tokens = LRSAConfig(sink_size=2, lag_size=16, retention=0.25), 66
    k, v = keys_and_values(num_tokens, 2)
    kept = select_kept(k, v, config)[0]
    figure = new_figure(8.2, 3.8)
    panels = figure.subplots(2, 1, sharex=True)
    sink, lag = config.sink_size, config.lag_size
    for head, panel in enumerate(panels):
        for p in range(kept.shape[1]):
            start = sink + p * lag
            parts = [x[0, head, start : start + lag] for x in (k, v)]
            references = [x[0, head, start + lag : start + 2 * lag] for x in (k, v)]
            scores = sum(lag_scores(part, reference) for part, reference in zip(parts, references, strict=True))
            chosen = set(kept[head, p].tolist())
            tokens = range(start, start + lag)
            colors = [KEPT if token in chosen else "#afb8c1" for token in tokens]
            panel.vlines(tokens, 11, (100 * scores).tolist(), color=colors, linewidth=1.2)
            panel.scatter(tokens, (100 * scores).tolist(), color=colors, s=22)
        panel.axvspan(-0.6, sink - 0.5, color=SINK, linewidth=0)
        panel.axvspan(sink + kept.shape[1] * lag - 0.5, num_tokens - 0.5, color=WINDOW, alpha=0.5, linewidth=0)
        for edge in range(sink, num_tokens, lag):
            panel.axvline(edge - 0.5, color="#57606a", linewidth=0.7, linestyle=":")
        panel.set_ylabel(f"KV head {head}\nscore, %", fontsize=10)
        panel.set_xlim(-0.6, num_tokens - 0.5)
        panel.set_ylim(11, 14.5)
    panels[1].set_xlabel("token", fontsize=11)
    entries = {
        "sink": SINK,
        f"kept ({config.num_kept} best of {lag})": KEPT,
        "dropped": "#afb8c1",
        "not scored yet: window": WINDOW,
    }
    legend(panels[0], entries, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return figure


def draw_cache_size() -> "Figure":
    """Entries of a cache over the tokens it has seen."""
    figure = new_figure(7.2, 3.6)
    panel = figure.subplots()
    tokens = list(range(1, 16385, 16))
    for retention in (1.0, 0.5, 0.25, 0.125):
        config, short = LRSAConfig(sink_size=16, lag_size=1024, retention=retention), retention_name(retention)
        name = short if config.is_dense else f"retention {short}"
        panel.plot(tokens, [num_held(n, config) for n in tokens], color=OF_CACHE[short], label=name, linewidth=1.8)
    panel.axvline(config.dense_prefix_size, color="#57606a", linewidth=0.8, linestyle=":")
    panel.text(config.dense_prefix_size + 150, 14500, "S + 2L: the first\ncompression", fontsize=10, va="top")
    panel.set_xlabel("tokens seen", fontsize=11)
    panel.set_ylabel("entries for each layer and KV head", fontsize=11)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.legend(fontsize=10, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panel.set_title(f"S = {config.sink_size}, L = {config.lag_size:,}", fontsize=11)
    return figure


def draw_exchange() -> "Figure":
    """Which of four ranks holds which tokens, under each exchange."""
    size, num_tokens = 4, 64
    figure = new_figure(8.2, 2.9)
    panel = figure.subplots()
    for row, strategy in enumerate((GATHER_KEPT, HEAD_GROUPS)):
        owners = strategy.owners(size)
        length = num_tokens // len(owners)
        for number, owner in enumerate(owners):
            panel.barh(row, length, left=number * length, color=RANKS[owner], edgecolor="white", height=0.6)
            panel.text(
                (number + 0.5) * length, row, f"rank {owner}", ha="center", va="center", fontsize=10,
                color="white" if owner in (0, 2) else "black",
            )  # fmt: skip
        for number in range(1, len(owners)):
            panel.annotate(
                "", (number * length + 1.6, row + 0.38), (number * length - 1.6, row + 0.38),
                arrowprops={"arrowstyle": "->", "color": "#24292f", "linewidth": 1.2},
            )  # fmt: skip
    panel.set_ylim(1.55, -0.45)
    panel.set_xlim(0, num_tokens)
    panel.set_yticks(
        [0, 1],
        ["gather_kept:\nkept KV to every rank", "head_groups:\nkept KV and queries\nto the ranks of their heads"],
        fontsize=10,
    )
    panel.set_xticks([0, num_tokens], ["first token", "last token"], fontsize=10)
    panel.set_title("Four ranks share a sequence; arrows: keys and values of S + 2L tokens", fontsize=11)
    return figure


@cache
def estimate(*overrides: str) -> Estimate:
    """What `launch/plan.py` estimates for these settings."""
    register_resolver()
    register_checkout()
    register_schema("train", PlanConfig)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = typed_config(compose("train", list(overrides)), PlanConfig)
    finally:
        register_schema("train", TrainConfig)  # what composes here afterwards is a run again
    job, sizes, *_ = job_and_sizes(config, config.machine, config.itemsize, config.num_targets)
    return Estimate(sizes, job, config.machine)


def draw_memory() -> "Figure":
    """GPU memory by part at the peak, for the settings of the page of 131,072 tokens."""
    parts = {
        "weights": "weights", "gradients": "gradients", "optimizer states": "optimizer states",
        "activation checkpoints": "checkpoints", "one layer: MLP": "the MLP of a layer",
    }  # fmt: skip
    figure = new_figure(9.4, 4.4)
    panel = figure.subplots()
    for row, settings in enumerate(PLANS.values()):
        memory = estimate(*settings).memory
        held = {**memory.static, **memory.moments[memory.peak_moment]}
        named = {label: held.get(part, 0) for part, label in parts.items()}
        named["the rest of a layer"] = sum(held.values()) - sum(named.values())
        left = 0.0
        for (label, size), color in zip(named.items(), (*PALETTE, GREY), strict=False):
            panel.barh(row, size / 1e9, left=left, color=color, height=0.62, label=label if row == 0 else None)
            left += size / 1e9
        total = panel.text(left + 0.8, row, f"{left:.1f}", va="center", fontsize=TICK)
        total.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # above the line at 80 GB
    panel.axvline(80, color=BLACK, linewidth=1.0, linestyle=":")
    panel.invert_yaxis()
    panel.set_xlim(0, 90)
    panel.set_yticks(range(len(PLANS)), list(PLANS), fontsize=TICK)
    panel.tick_params(axis="x", labelsize=TICK)
    panel.set_xlabel("GPU memory at the peak of a step, GB (estimated; dotted: 80 GB)", fontsize=LABEL)
    figure.legend(fontsize=TICK, frameon=False, ncols=3, loc="outside upper center")
    return figure


def draw_traffic() -> "Figure":
    """What a rank sends in one forward pass over a layer of an 8B model, by the number of ranks."""
    found = estimate("+recipe=qa_128k", "model=llama_8b", "gpus=8")
    figure = new_figure(7.8, 3.9)
    panel = figure.subplots()
    ranks = (2, 4, 8, 16, 32)

    def megabytes(config: LRSAConfig, exchange: str) -> list[float]:
        jobs = [replace(found.job, sp_size=n, num_gpus=n, exchange=exchange) for n in ranks]
        return [sum(pass_bytes(found.sizes, job, config).values()) / 1e6 for job in jobs]

    dense = LRSAConfig(sink_size=16, lag_size=1024, retention=1.0)
    panel.plot(ranks, megabytes(dense, "gather_kept"), color=BLACK, marker="s", label="dense: DeepSpeed-Ulysses")
    for retention in (0.25, 0.125):
        config, short = replace(dense, retention=retention), retention_name(retention)
        for exchange, marker, line in (("gather_kept", "o", "-"), ("head_groups", "^", "--")):
            sent, label = megabytes(config, exchange), f"{short}: {exchange}"
            panel.plot(ranks, sent, color=OF_CACHE[short], marker=marker, linestyle=line, label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ranks, [str(n) for n in ranks])
    panel.set_yticks([50, 100, 200, 500], ["50", "100", "200", "500"])
    panel.minorticks_off()
    panel.tick_params(labelsize=TICK)
    panel.set_xlabel("parallel.sp_size: ranks that share 131,072 tokens", fontsize=LABEL)
    panel.set_ylabel("MB sent by a rank, forward,\nfor each layer", fontsize=LABEL)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.legend(fontsize=TICK, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


FIGURES: dict[str, Callable[[], "Figure"]] = {
    "mask.png": draw_mask,
    "partitions.png": draw_partitions,
    "kept.png": draw_kept,
    "cache_size.png": draw_cache_size,
    "exchange.png": draw_exchange,
    "memory.png": draw_memory,
    "traffic.png": draw_traffic,
}


def draw_answers(path: Path) -> None:
    """The measured answers of the README, as `launch/compare.py` draws them."""
    names = {"xquad": "XQuAD", "covid": "COVID-QA", "signature": "signature", "lookup": "lookup", "passkey": "passkey"}
    with RESULTS.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["task"] in names]
    words = ("task", "cache", "group")
    numbers = [{key: value if key in words else float(value or "nan") for key, value in row.items()} for row in found]
    rows = [row | {"task": names[row["task"]]} for row in numbers]
    comparison.draw(sorted(rows, key=lambda row: list(names.values()).index(row["task"])), path)


def write(folder: Path) -> list[Path]:
    """Draws every figure into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        save_figure(draw(), folder / name)
    draw_answers(folder / "answers.png")
    return [*(folder / name for name in FIGURES), folder / "answers.png"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    for path in write(parser.parse_args().folder):
        print(path)
