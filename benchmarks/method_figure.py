"""Draw the method in one picture: ``python benchmarks/method_figure.py docs/images/method.png``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from steplm.report.style import FROZEN, INK, KIND_COLORS, MUTED, RC, RUN_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED, ADAPTER, MERGED = RUN_COLORS[0], KIND_COLORS["adapters"], KIND_COLORS["weights"]

# Layers of the drawn model, bottom to top: the layer's index in the previous stage, or None if it is new.
STAGE_2 = (0, 1, None, 2, None, 3)
STAGE_3 = (0, 1, 2, 3, None, 4, None, 5)
ADAPTER_SHARE = 0.2  # adapter parameters / layer parameters, as for LoRA of rank 128 at hidden size 1024

WIDTH, HEIGHT, PITCH, COLUMN = 1.5, 0.30, 0.385, 3.15
ADAPTER_X, ADAPTER_WIDTH = WIDTH + 0.06, 0.2


def method_figure(path: str | Path) -> Path:
    """Draw the stages from a small model to the merged one; the suffix of ``path`` selects PNG or SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(9.6, 4.9), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axes.set_xlim(-0.2, 3 * COLUMN + WIDTH + 0.4)
        axes.set_ylim(-1.8, 4.75)
        axes.axis("off")

        stage_1: tuple[int | None, ...] = (None,) * 4
        merged = tuple(range(len(STAGE_3)))
        for column, layers in enumerate((stage_1, STAGE_2, STAGE_3)):
            _stack(axes, column, [TRAINED if origin is None else FROZEN for origin in layers])
            _model_states(axes, column, layers)
        _stack(axes, 3, [MERGED] * len(merged), outer=MERGED)
        _growth(axes, 0, STAGE_2)
        _growth(axes, 1, STAGE_3)
        _growth(axes, 2, merged)
        _titles(axes)
        _legend(axes)

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _block(axes: Axes, x: float, y: float, width: float, height: float, color: str, edge: str = "none") -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = f"round,pad=0,rounding_size={0.055 if height > 0.15 else 0.03}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor=edge, linewidth=1))


def _y(layer: int) -> float:
    return PITCH * (layer + 1)


def _stack(axes: Axes, column: int, colors: list[str], outer: str = TRAINED) -> None:
    """Draw embeddings, layers and head, with an adapter next to every frozen layer."""
    x = column * COLUMN
    middle = ["new" if color == TRAINED and column > 0 else "" for color in colors]
    names = ["embeddings", *middle, "head"]
    for index, (name, color) in enumerate(zip(names, [outer, *colors, outer], strict=True)):
        y = PITCH * index
        _block(axes, x, y, WIDTH, HEIGHT, color)
        axes.text(x + WIDTH / 2, y + HEIGHT / 2 - 0.015, name, color="white", fontsize=7.5, ha="center", va="center")
        if color == FROZEN:
            _block(axes, x + ADAPTER_X, y, ADAPTER_WIDTH, HEIGHT, ADAPTER)


def _growth(axes: Axes, column: int, origins: tuple[int | None, ...]) -> None:
    """Draw a gray line from each layer to itself in the next stage, and blue ones from its neighbors to a new layer."""
    has_adapters = column > 0
    start = column * COLUMN + (ADAPTER_X + ADAPTER_WIDTH if has_adapters else WIDTH) + 0.06
    end = (column + 1) * COLUMN - 0.06
    for layer, origin in enumerate(origins):
        if origin is not None:
            _thread(axes, start, _y(origin), end, _y(layer), "#b4bcc6", 1.0)
            continue
        below, above = origins[layer - 1], origins[layer + 1]
        for parent in (below, above):
            assert parent is not None
            _thread(axes, start, _y(parent), end, _y(layer), TRAINED, 1.1)


def _thread(axes: Axes, x0: float, y0: float, x1: float, y1: float, color: str, width: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    y0, y1, middle = y0 + HEIGHT / 2, y1 + HEIGHT / 2, (x0 + x1) / 2
    curve = Curve([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], [Curve.MOVETO, *[Curve.CURVE4] * 3])
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=color, linewidth=width, alpha=0.9))


def _model_states(axes: Axes, column: int, layers: tuple[int | None, ...]) -> None:
    """Draw a bar of model-state bytes: 16 per trained parameter, 2 per frozen one; the outline shows vanilla."""
    from matplotlib.patches import Rectangle

    num_new = sum(origin is None for origin in layers)
    num_old = len(layers) - num_new
    parts = ((16 * num_new, TRAINED), (2 * num_old, FROZEN), (16 * num_old * ADAPTER_SHARE, ADAPTER))
    scale = (ADAPTER_X + ADAPTER_WIDTH) / (16 * len(STAGE_3))
    x, y, height = column * COLUMN, -0.62, 0.17
    for size, color in parts:
        axes.add_patch(Rectangle((x, y), size * scale, height, facecolor=color, edgecolor="none"))
        x += size * scale
    full = Rectangle((column * COLUMN, y), 16 * len(STAGE_3) * scale, height)
    full.set(facecolor="none", edgecolor=MUTED, linewidth=0.9)
    axes.add_patch(full)


def _titles(axes: Axes) -> None:
    texts = (
        ("Stage 1", "a small model, trained\nin the ordinary way"),
        ("Stage 2", "new layers between the old;\nold ones frozen, with adapters"),
        ("Stage 3", "adapters merged,\nand the same again"),
        ("Result", "adapters merged: a plain\nmodel of the full depth"),
    )
    for column, (title, text) in enumerate(texts):
        x = column * COLUMN
        axes.text(x, -0.82, title, fontsize=10.5, fontweight="bold", va="top")
        axes.text(x, -1.1, text, fontsize=8.5, color=MUTED, va="top", linespacing=1.35)
    note = "bytes held in training\n(outline: ordinary training)"
    axes.text(3 * COLUMN, -0.535, note, fontsize=7.5, color=MUTED, va="center", linespacing=1.3)
    for column, text in enumerate(("grow", "merge, grow", "merge")):
        left = column * COLUMN + (ADAPTER_X + ADAPTER_WIDTH if column else WIDTH) + 0.06
        right = (column + 1) * COLUMN - 0.06
        axes.annotate(
            "",
            (right, 0.06),
            xytext=(left, 0.06),
            arrowprops={"arrowstyle": "->", "color": MUTED, "linewidth": 1.0},
        )
        axes.text((left + right) / 2, 0.13, text, fontsize=8.5, color=INK, ha="center", va="bottom")


def _legend(axes: Axes) -> None:
    entries = (
        (TRAINED, "trained: 16 bytes a parameter"),
        (FROZEN, "frozen: 2 bytes a parameter"),
        (ADAPTER, "LoRA adapter: 16 bytes, on few parameters"),
    )
    for row, (color, text) in enumerate(entries):
        y = 4.42 - 0.3 * row
        _block(axes, 0, y, 0.2, 0.17, color)
        axes.text(0.32, y + 0.075, text, fontsize=8.5, va="center")


if __name__ == "__main__":
    print(method_figure(sys.argv[1] if len(sys.argv) > 1 else "docs/images/method.png"))
