"""Time of attention over sequence length: `python benchmarks/plot.py ATTENTION_CSV PNG`.

The CSV is that of `launch/benchmark.py attention`, of one GPU and one shape. Dotted is the floor that multiplications
alone would set LRSA: the fastest dense method's time by the share of the pairs of query and key that LRSA sees.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from lrsa_ds import LRSAConfig  # noqa: E402
from lrsa_ds.attention.partition import partition_table  # noqa: E402

Curves = dict[tuple[str, str], dict[int, float]]


def curves_of(path: Path) -> tuple[Curves, dict[str, str]]:
    """Milliseconds by (method, num_kept) and length, the latest of each; and the last row, for the title."""
    curves: Curves = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["what"] == "forward+backward":
                curves[row["method"], row["num_kept"]][int(row["num_tokens"])] = float(row["ms_p50"])
                last = row
    if not curves:
        raise SystemExit(f"{path} has no row with what = forward+backward.")
    return dict(curves), last


def floor(curves: Curves, num_kept: int, row: dict[str, str]) -> dict[int, float]:
    """Milliseconds that the fastest dense method would take for the pairs that LRSA sees, by length."""
    sink, lag = int(row["sink_size"]), int(row["lag_size"])
    config = LRSAConfig(sink_size=sink, lag_size=lag, retention=num_kept / lag)
    dense = [times for (method, kept), times in curves.items() if not kept]
    lengths = sorted(set().union(*dense))
    fastest = {n: min(times[n] for times in dense if n in times) for n in lengths}
    return {n: fastest[n] * partition_table((n,), config).num_pairs / (n * (n + 1) / 2) for n in lengths}


def draw(curves: Curves, row: dict[str, str], path: Path) -> None:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours: dict[str, str] = {}
    for (method, kept), times in sorted(curves.items(), key=lambda item: (item[0][1] != "", item[0])):
        label = f"{method}, K = {kept}" if kept else method
        (line,) = axes.plot(
            *zip(*sorted(times.items()), strict=True), marker="o", label=label, ls="-" if kept else "--"
        )
        colours.setdefault(kept, line.get_color())
    for kept in sorted({kept for _, kept in curves if kept}, key=int):
        times = floor(curves, int(kept), row)
        if times:
            label = f"floor by multiplications, K = {kept}"
            axes.plot(*zip(*sorted(times.items()), strict=True), color=colours[kept], ls=":", label=label)
    lengths = sorted(set().union(*curves.values()))
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward + backward, ms")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
    axes.minorticks_off()
    heads = row["heads"].strip("[]").replace(" ", "").split(",")
    axes.set_title(
        f"Attention on {row['device']}, {heads[0]}/{heads[1]} heads, head dim {heads[2]}, "
        f"S = {row['sink_size']}, L = {row['lag_size']}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(*curves_of(Path(sys.argv[1])), Path(sys.argv[2]))
