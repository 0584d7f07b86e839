"""Picture of what fits a budget: memory against time, colored by the cost in quality."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from pathlib import Path

from steplm.planner.fit import Alternative, FitResult
from steplm.report.style import INK, MUTED, clean, figure_file
from steplm.units import binary_unit

LINE_WIDTH = 66  # characters per line of the list
LABEL_CELLS = 14  # points in one cell of a grid this fine share a label


def fit_figure(result: FitResult, path: str | Path) -> Path:
    """Draw the alternatives and write a PNG, or the format named by the suffix of ``path``.

    The x axis is the maximized size or, if none is maximized, the memory that the device needs, including the reserve.
    The y axis is hours or, without a device, FLOPs relative to the best alternative. The numbers count the rows of the
    table that ``steplm fit`` prints.
    """
    path = Path(path)
    rows = result.alternatives
    unit, size = binary_unit(result.budget_bytes)
    has_hours = result.best.seconds is not None
    heights = [(row.seconds or 0) / 3600 if has_hours else row.flops / result.best.flops for row in rows]
    across = [row.needed_bytes / size if row.value is None else float(row.value) for row in rows]
    listed = [line for number, row in enumerate(rows, start=1) for line in _listed(number, row)]
    height = max(5.2, 0.15 * len(listed) + 0.9)  # inches
    with figure_file(path, (9.2, height)) as figure:
        axes = figure.add_axes((0.07, 0.57 / height, 0.5, 1 - 1.25 / height))
        clean(axes)
        points = axes.scatter(
            across,
            heights,
            c=[row.quality_price for row in rows],
            cmap="cividis_r",
            vmin=0,
            vmax=max(1, *(row.quality_price for row in rows)),
            s=46,
            edgecolors=INK,
            linewidths=0.7,
            zorder=3,
        )
        axes.set_xlim(0, 1.06 * max(across))
        axes.set_ylim(0, 1.12 * max(heights))
        if result.maximize is None:
            axes.axvline(result.budget_bytes / size, color=MUTED, linestyle=(0, (4, 2)), linewidth=0.9)
            axes.set_xlim(0, 1.04 * result.budget_bytes / size)
        axes.set_xlabel(result.maximize or f"memory needed, {unit} (dashed: the budget)")
        axes.set_ylabel("hours" if has_hours else "FLOPs, relative to row 1")
        for (x, y), numbers in _close_points(across, heights).items():
            text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
            axes.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", fontsize=7.5, ha="center")
        bar = figure.colorbar(
            points, cax=figure.add_axes((0.07, 1 - 0.3 / height, 0.16, 0.09 / height)), orientation="horizontal"
        )
        bar.outline.set_visible(False)
        figure.text(
            0.245, 1 - 0.26 / height, "cost in quality, in points of fit (0: none known)", fontsize=7.5, va="center"
        )
        figure.text(0.6, 1 - 0.68 / height, "\n".join(listed), fontsize=6.5, va="top", linespacing=1.45)
    return path


def _close_points(across: list[float], up: list[float]) -> dict[tuple[float, float], list[int]]:
    """Row numbers by label position; points that are close together share a label."""
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (x, y) in enumerate(zip(across, up, strict=True)):
        cells[round(LABEL_CELLS * x / max(across)), round(LABEL_CELLS * y / max(up))].append(index)
    return {
        (sum(across[i] for i in group) / len(group), max(up[i] for i in group)): [i + 1 for i in group]
        for group in cells.values()
    }


def _listed(number: int, row: Alternative) -> list[str]:
    value = "" if row.value is None else f"{row.value:,}; "
    stages = f"{row.num_stages} stage{'s' * (row.num_stages > 1)}"
    rank = "" if row.rank is None else f" of rank {row.rank}"
    text = f"{value}{stages}{rank}, {', '.join(row.options) or 'no option'}"
    return textwrap.wrap(text, LINE_WIDTH, initial_indent=f"{number:>2}  ", subsequent_indent="      ")
