"""Pictures: figures without a screen, the colours of caches, and files that cannot be written as one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_ds.errors import LRSAError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with colour blindness tell apart. A cache has one colour in every picture.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
OF_CACHE = {"dense": BLACK, "1/2": BLUE, "1/4": ORANGE, "1/8": GREEN, "1/16": PURPLE}
GREY = "#6e7781"  # lines, and whatever belongs to no cache
# Font sizes in points, so that a picture can be read at half its size.
TITLE, LABEL, TICK = 12.5, 11.0, 10.0


def cache_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each cache: by its retention, or the next one that is free. `names` go from the largest cache on."""
    fixed = {name: OF_CACHE[name] for name in names if name in OF_CACHE}
    order = dict.fromkeys((VERMILION, SKY, PURPLE, *PALETTE))
    free = cycle([color for color in order if color not in fixed.values()] or [GREY])
    return {name: fixed[name] if name in fixed else next(free) for name in names}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; without pyplot, which would need a window and keep every figure."""
    # Only here: every rank of every run would wait more than half a second for what rank 0 draws in the end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG.

    Raises:
        LRSAError: `path` cannot be written.
    """
    try:
        figure.savefig(path)
    except OSError as error:
        raise LRSAError(f"{path} cannot be written: {error.strerror}.") from error
