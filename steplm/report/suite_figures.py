"""The figures of a suite as PNG files: the page's charts, drawn with Matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.report.charts import all_charts
from steplm.report.curves import AXES, Look, looks
from steplm.report.figure import OUTSIDE, run_figure
from steplm.report.labels import USUAL_FONT, USUAL_SIZE
from steplm.report.style import FAINT, INK, MUTED, clean, figure_file, spread
from steplm.report.summary import Suite
from steplm.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Chart kind -> figure name, which follows the question's prefix.
NAMES = {
    "loss": "loss_tokens",
    "tradeoff": "perplexity_memory",
    "memory": "memory",
    "growth": "growth",
    "rates": "learning_rate",
    "documents": "document_lengths",
}
LINE_STYLES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.6))}
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "star": "*"}
LABEL_FONT = 8.5  # points
TRADEOFF_SCALE = 0.6  # points of the figure per pixel of the page, for which labels were placed


def write_figures(suite: Suite, directory: Path) -> dict[str, Path]:
    """Draw every chart that has data; return the files by name: ``q1_loss_tokens``, ..., ``learning_rate``."""
    directory.mkdir(parents=True, exist_ok=True)
    look = looks(suite)
    drawn: dict[str, Path] = {}
    for chart in all_charts(suite, look):
        for axis in AXES if chart["kind"] == "loss" else ("tokens",):
            name = figure_name(chart, axis)
            drawn[name] = directory / f"{name}.png"
            _draw_chart(chart, look, axis, drawn[name])
    if len(suite.runs) == 1 and (record := suite.runs[0].record) is not None and record.events_of("train"):
        drawn["run"] = run_figure([record], directory / "run.png")
    return drawn


def figure_name(chart: Mapping[str, Any], axis: str = "tokens") -> str:
    """The name of the figure of a chart; the page shows that over tokens if Plotly is not installed."""
    kind = chart["kind"]
    name = f"loss_{axis}" if kind == "loss" else NAMES[kind]
    return name if kind in ("rates", "documents") else f"{chart['section']}_{name}"


def _draw_chart(chart: Mapping[str, Any], look: Mapping[str, Look], axis: str, path: Path) -> None:
    options = {"bbox_inches": "tight", "pad_inches": 0.15}  # grows to fit long labels
    with figure_file(path, (9.2, 4.6), **options) as figure:
        width, height = 0.66, 0.83
        if chart["kind"] == "tradeoff":  # the size that its labels were placed for
            width = TRADEOFF_SCALE * USUAL_SIZE[0] / 72 / figure.get_figwidth()
            height = TRADEOFF_SCALE * USUAL_SIZE[1] / 72 / figure.get_figheight()
        axes = figure.add_axes((0.07, 0.12, width, height))
        clean(axes)
        if chart["kind"] == "tradeoff":
            axes.grid(axis="x", color=FAINT, linewidth=0.8)
        base = None  # where the next area of a stack begins
        for trace in chart["traces"]:
            x = trace["x"] if isinstance(trace["x"], list) else trace["x"][axis]
            style = look.get(trace.get("entry", ""), Look(None, "solid", "circle"))
            if trace["role"] == "area":
                base = base or [0.0] * len(x)
                top = [low + value for low, value in zip(base, trace["y"], strict=True)]
                axes.fill_between(x, base, top, color=trace["color"], linewidth=0, label=trace["name"])
                base = top
            else:
                _draw_trace(axes, x, trace, style)
        _finish(axes, chart, axis)
        _label_ends(axes, chart["ends"], look)


# --- a trace by its role ------------------------------------------------------------------------------------


def _draw_trace(axes: Axes, x: Sequence[float], trace: Mapping[str, Any], look: Look) -> None:
    y, color = trace.get("y", ()), look.ink
    line: dict[str, Any] = {"color": color, "linewidth": 1.6, "linestyle": LINE_STYLES[look.dash]}
    match trace["role"]:
        case "line":
            axes.plot(x, y, **line, marker="o" if trace.get("markers") else None, markersize=3)
        case "faint":
            axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
        case "band":
            axes.fill_between(x, trace["low"], trace["high"], color=color, alpha=0.12, linewidth=0)
        case "growth":
            axes.plot(x, y, "o", color=color, markerfacecolor="white", markersize=5, zorder=4)
        case "step":
            axes.plot(x, y, **line, drawstyle="steps-post")
        case "planned":
            axes.plot(x, y, color=INK, linewidth=1.3, linestyle=(0, (4, 2)), drawstyle="steps-post")
        case "measured":
            axes.plot(x, y, color=color, alpha=0.2, linewidth=6, solid_capstyle="butt")
        case "frontier":
            axes.plot(x, y, color=MUTED, alpha=0.22, linewidth=6, drawstyle="steps-post", zorder=1)
        case "rates":
            axes.plot(x, y, **line, marker="o", markersize=4.5, markerfacecolor="white")
            chosen = [i for i, is_chosen in enumerate(trace["chosen"]) if is_chosen]
            axes.plot([x[i] for i in chosen], [y[i] for i in chosen], "o", color=color, markersize=7, zorder=4)
        case "bars":
            axes.bar(x, y, width=1.0, color=trace["color"], edgecolor="white", linewidth=0.8)
        case "diverged":
            axes.plot(x, y, "x", color=color, markersize=7, clip_on=False)
        case "point":
            _draw_point(axes, x[0], y[0], trace, look)


def _draw_point(axes: Axes, x: float, y: float, trace: Mapping[str, Any], look: Look) -> None:
    """Draw a point with its interval, and its label at the position chosen by the chart."""
    color, label = look.ink, trace["label"]
    if "error" in trace:
        up, down = trace["error"]
        axes.plot([x, x], [y - down, y + up], color=color, linewidth=1.0, alpha=0.55, zorder=2)
    face = "white" if trace["hollow"] else color
    axes.plot(x, y, MARKERS[look.marker], color=color, markersize=7, markerfacecolor=face, zorder=3)
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 5}
    axes.annotate(
        label["plain"], (x, y), (label["dx"] * TRADEOFF_SCALE, -label["dy"] * TRADEOFF_SCALE),
        textcoords="offset points", ha=label["anchor"], va="center", color=color, zorder=5,
        fontsize=USUAL_FONT * TRADEOFF_SCALE, arrowprops=line if label["far"] else None,
    )  # fmt: skip


# --- axes and labels ----------------------------------------------------------------------------------------


def _finish(axes: Axes, chart: Mapping[str, Any], axis: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    title = chart["x_titles"][axis] if "x_titles" in chart else chart["x_title"]
    axes.set_xlabel(title)
    axes.set_ylabel(chart["y_title"])
    axes.set_title(chart["about"], loc="left", color=MUTED, fontsize=8.5)
    if chart["kind"] in ("loss", "memory") and axes.dataLim.x1 > 0:  # not empty
        axes.set_xlim(0, axes.dataLim.x1)
    if "x_tick_labels" in chart:
        axes.set_xticks(chart["x_ticks"], chart["x_tick_labels"])
    elif "x_ticks" in chart:
        axes.set_xscale("log")
        axes.set_xticks(chart["x_ticks"], [f"{rate:g}" for rate in chart["x_ticks"]])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8))
    if "x_tick_labels" not in chart and ("tokens" in title or "FLOPs" in title):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    if chart.get("x_range"):
        axes.set_xlim(*chart["x_range"])
    if chart.get("y_range"):
        axes.set_ylim(*chart["y_range"])
    if chart.get("y_from_zero"):
        axes.set_ylim(0, 1.06 * axes.dataLim.y1)
    if chart.get("mark_zero"):
        axes.axvline(0, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(1.01, 0), frameon=False, labelcolor=MUTED, fontsize=8.5)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], look: Mapping[str, Look]) -> None:
    """Label lines to the right of the axes near where they end, each label with a sample of its line."""
    low, high = axes.get_ylim()
    inches = axes.get_position().height * axes.get_figure().get_figheight()  # type: ignore[union-attr]
    gap = 1.45 * LABEL_FONT / 72 / inches
    wanted = [(value - low) / (high - low) for value, *_ in ends]
    heights = spread([min(max(h, 0.0), 1.0) for h in wanted], gap, 0.0, max(1.0, gap * (len(ends) - 1)))
    inner: dict[str, Any] = {"xycoords": "axes fraction", "annotation_clip": False}
    for height, at, (_, text, entry) in zip(heights, wanted, ends, strict=True):
        style = look[entry]
        if abs(height - at) > 0.4 * gap:
            link = {"arrowstyle": "-", "color": style.ink, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (1.0, min(max(at, 0), 1)), xytext=(1.018, height), arrowprops=link, **inner)
        axes.plot(
            [1.02, 1.065], [height] * 2, transform=axes.transAxes, clip_on=False, linewidth=1.8, scalex=False,
            scaley=False, color=style.ink, linestyle=LINE_STYLES[style.dash],
        )  # fmt: skip
        axes.annotate(text, (1.07, height), xytext=(2, 0), va="center", color=style.ink, fontsize=LABEL_FONT, **OUTSIDE)
