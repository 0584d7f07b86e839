"""Colors and fonts of all figures, so that a color means the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#6b7785"
FAINT = "#e6e9ed"
FROZEN = "#c3cad3"

# Distinguishable with red-green color blindness, and in grayscale.
RUN_COLORS = ("#1f6fb2", "#d9662b", "#2a9d74", "#8e5bb5", "#b8891a", "#c2437a")
RUN_COLORS_ON_DARK = ("#5ea9e8", "#ee8a58", "#4cc39a", "#b98ae0", "#d8ad4e", "#e5729f")
KIND_COLORS = {"weights": "#23415f", "gradients": "#5289b5", "optimizer": "#a6c8e1", "adapters": "#e8944a"}

RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#b4bcc6",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#b4bcc6",
    "ytick.color": "#b4bcc6",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "svg.fonttype": "none",
}


@contextmanager
def figure_file(path: Path, size: tuple[float, float], **options: Any) -> Iterator[Figure]:
    """A figure of this size (inches) to draw on; written to ``path`` at the end, with options of ``savefig``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=size, dpi=200, facecolor="white")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, **options)


def clean(axes: Axes) -> None:
    """Remove the top and right spines, and add a light horizontal grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.tick_params(length=3, width=0.8)


def spread(wanted: list[float], gap: float, lowest: float = 0.0, highest: float = 1.0) -> list[float]:
    """Positions near those in ``wanted`` and in the same order, but at least ``gap`` apart."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed: list[float] = []
    for index in order:
        placed.append(max(wanted[index], placed[-1] + gap if placed else lowest))
    ceiling = highest
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    positions = [0.0] * len(wanted)
    for index, position in zip(order, placed, strict=True):
        positions[index] = position
    return positions
