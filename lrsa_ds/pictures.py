"""Pictures: figures without a screen, and files that cannot be written as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_ds.errors import LRSAError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
