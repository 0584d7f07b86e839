"""The figures of a suite as PNG files: for each question its losses, trade-off, growth and memory; and the tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.report.curves import (
    AXES,
    Curve,
    GrowthWindow,
    Look,
    curve,
    frontier,
    growth_windows,
    looks,
    loss_range,
)
from steplm.report.figure import OUTSIDE, measured_spans, run_figure
from steplm.report.labels import RADII, anchor, place_labels
from steplm.report.style import FAINT, MUTED, RC, clean, spread
from steplm.report.summary import EntrySummary, Estimate, Suite
from steplm.report.tables import tuning_run
from steplm.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.6))}
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "star": "*"}
MOST_WINDOWS = 12  # growths that are drawn for a question
AXIS_FORMATS: dict[str, Callable[[float], str]] = {
    "tokens": format_count,
    "flops": format_count,
    "seconds": lambda seconds: "0" if seconds == 0 else format_seconds(seconds).removesuffix("00s").removesuffix("00m"),
}
TIME_TICKS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)  # seconds


def write_figures(suite: Suite, directory: Path) -> dict[str, Path]:
    """Draw all that the runs allow; returns the files by name: ``q1_loss_tokens``, ..., ``learning_rate``."""
    directory.mkdir(parents=True, exist_ok=True)
    look = looks(suite)
    drawn: dict[str, Path] = {}
    for number, question in enumerate(suite.record.questions, start=1):
        entries = suite.of(question)
        curves = [c for entry in entries if (c := curve(entry)) is not None]
        for axis in AXES:
            _save(drawn, directory, f"q{number}_loss_{axis}", loss_figure(curves, look, axis))
        _save(drawn, directory, f"q{number}_perplexity_memory", pareto_figure(entries, look))
        _save(drawn, directory, f"q{number}_growth", growth_figure(curves, look))
        _save(drawn, directory, f"q{number}_memory", memory_figure(entries, look))
    _save(drawn, directory, "learning_rate", learning_rate_figure(suite, look))
    if len(suite.runs) == 1 and (record := suite.runs[0].record) is not None and record.events_of("train"):
        drawn["run"] = run_figure([record], directory / "run.png")
    return drawn


def _save(drawn: dict[str, Path], directory: Path, name: str, figure: Figure | None) -> None:
    if figure is None:
        return
    from matplotlib import rc_context

    drawn[name] = directory / f"{name}.png"
    with rc_context(RC):
        figure.savefig(drawn[name], bbox_inches="tight", pad_inches=0.15)  # however long the labels are


@contextmanager
def _canvas(width: float = 9.2, height: float = 4.6) -> Iterator[Figure]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _line(look: Look, **more: Any) -> dict[str, Any]:
    return {"color": look.ink, "linestyle": LINE_STYLES[look.dash], "linewidth": 1.6, **more}


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, Look]], size: float = 8.5) -> None:
    """Names to the right of the axes, near the heights of their lines, with a piece of the line before each."""
    low, high = axes.get_ylim()
    inches = axes.get_position().height * axes.get_figure().get_figheight()  # type: ignore[union-attr]
    gap = 1.45 * size / 72 / inches
    wanted = [(value - low) / (high - low) for value, *_ in ends]
    heights = spread([min(max(h, 0.0), 1.0) for h in wanted], gap, 0.0, max(1.0, gap * (len(ends) - 1)))
    inner: dict[str, Any] = {"xycoords": "axes fraction", "annotation_clip": False}
    for height, at, (_, text, look) in zip(heights, wanted, ends, strict=True):
        if abs(height - at) > 0.4 * gap:
            link = {"arrowstyle": "-", "color": look.ink, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (1.0, min(max(at, 0), 1)), xytext=(1.018, height), arrowprops=link, **inner)
        sample = {k: v for k, v in _line(look).items() if k != "linewidth"}
        axes.plot(
            [1.02, 1.065], [height] * 2, transform=axes.transAxes, clip_on=False, linewidth=1.8, scalex=False,
            scaley=False, **sample,
        )  # fmt: skip
        axes.annotate(text, (1.07, height), xytext=(2, 0), va="center", color=look.ink, fontsize=size, **OUTSIDE)


# --- loss ---------------------------------------------------------------------------------------------------


def loss_figure(curves: Sequence[Curve], look: dict[str, Look], axis: str) -> Figure | None:
    """Validation loss over tokens, FLOPs or seconds: the mean of the seeds, their extremes pale, growths as circles."""
    curves = [drawn for drawn in curves if drawn.validation.loss]  # of a run that has begun there may be none yet
    shown = loss_range(curves)
    if shown is None:
        return None
    with _canvas() as figure:
        axes = figure.add_axes((0.07, 0.12, 0.66, 0.83))
        clean(axes)
        axes.set_ylim(*shown)
        ends: list[tuple[float, str, Look]] = []
        for drawn in curves:
            style, series = look[drawn.entry.entry.name], drawn.validation
            x = series.on(axis)
            if len(curves) <= 4:
                axes.fill_between(x, series.low, series.high, color=style.ink, alpha=0.12, linewidth=0)
            axes.plot(x, series.loss, **_line(style), solid_capstyle="round")
            growths = [i for i, tokens in enumerate(series.tokens) if tokens in {p.tokens for p in drawn.growths}]
            axes.plot(
                [x[i] for i in growths], [series.loss[i] for i in growths], linestyle="none", marker="o",
                markersize=5, markerfacecolor="white", markeredgecolor=style.ink, markeredgewidth=1.3, zorder=4,
            )  # fmt: skip
            ends.append((series.loss[-1], f"{drawn.entry.label}  {series.loss[-1]:.3f}", style))
        _numbers(axes, axis)
        axes.set_ylabel("validation loss, nats a token")
        if any(drawn.growths for drawn in curves):
            axes.plot([], [], "o", color=MUTED, markerfacecolor="white", markersize=5, label="growth")
            axes.legend(loc="upper right", frameon=False, labelcolor=MUTED, fontsize=8.5)
        _label_ends(axes, ends)
    return figure


def _numbers(axes: Axes, axis: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

    axes.set_xlim(0, axes.dataLim.x1)
    if axis == "seconds":
        longest = axes.get_xlim()[1]
        axes.xaxis.set_major_locator(MultipleLocator(next((t for t in TIME_TICKS if longest / t <= 8), TIME_TICKS[-1])))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: AXIS_FORMATS[axis](value)))
    axes.set_xlabel(AXES[axis])


# --- perplexity against memory ------------------------------------------------------------------------------


def pareto_figure(entries: Sequence[EntrySummary], look: dict[str, Look]) -> Figure | None:
    """A point an entry, with its interval over seeds; hollow where seeds are missing; the frontier as a line."""
    points = [
        (entry, plan.peak_model_state_bytes, loss.exp())
        for entry in entries
        if (loss := entry.validation_loss) is not None and (plan := entry.plan) is not None
    ]
    if len(points) < 2:
        return None
    unit, name = _unit([num_bytes for _, num_bytes, _ in points])
    with _canvas(9.2, 5.2) as figure:
        axes = figure.add_axes((0.08, 0.11, 0.89, 0.85))
        clean(axes)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        spots = [(num_bytes / unit, value.mean) for _, num_bytes, value in points]
        best = frontier(spots)
        axes.plot(
            [x for x, _ in best], [y for _, y in best], color=MUTED, linewidth=6, alpha=0.22, drawstyle="steps-post",
            solid_joinstyle="round", zorder=1,
        )  # fmt: skip
        for (entry, _, value), (x, y) in zip(points, spots, strict=True):
            style = look[entry.entry.name]
            whole = len(entry.finished) == len(entry.runs)
            if value.low is not None and value.high is not None:
                axes.plot([x, x], [value.low, value.high], color=style.ink, linewidth=1.0, alpha=0.55, zorder=2)
            axes.plot(
                x, y, marker=MARKERS[style.marker], color=style.ink, markersize=8, zorder=3,
                markerfacecolor=style.ink if whole else "white", markeredgewidth=1.2, linestyle="none",
            )  # fmt: skip
        axes.margins(x=0.12, y=0.08)
        axes.set_xlabel(f"peak model-state memory, {name}")
        axes.set_ylabel("validation perplexity")
        _label_points(
            figure,
            axes,
            [(x, y, v, e.label, look[e.entry.name]) for (e, _, v), (x, y) in zip(points, spots, strict=True)],
        )
    return figure


def _label_points(figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, Estimate, str, Look]]) -> None:
    """The name of each point at a free place beside it, or farther out with a line to it."""
    figure.draw_without_rendering()  # the limits of the axes are not settled before
    points = 72 / figure.dpi
    area = axes.get_window_extent()

    def place(x: float, y: float) -> tuple[float, float]:
        px, py = axes.transData.transform((x, y))
        return (px - area.x0) * points, (py - area.y0) * points

    bars = [(*place(x, e.low), *place(x, e.high)) for x, _, e, *_ in labels if e.low is not None and e.high is not None]
    offsets = place_labels(
        [place(x, y) for x, y, *_ in labels],
        [text for *_, text, _ in labels],
        (area.width * points, area.height * points),
        font_size=8.5,
        obstacles=[(x0 - 1, y0, x1 + 1, y1) for x0, y0, x1, y1 in bars],
    )
    for (x, y, _, text, style), (dx, dy) in zip(labels, offsets, strict=True):
        line = {"arrowstyle": "-", "color": style.ink, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 5}
        axes.annotate(
            text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=anchor(dx), va="center", color=style.ink,
            fontsize=8.5, zorder=5, arrowprops=line if math.hypot(dx, dy) > RADII[0] + 1 else None,
        )  # fmt: skip


def _unit(num_bytes: Sequence[float]) -> tuple[int, str]:
    return (2**30, "GiB") if max(num_bytes, default=0) >= 2**30 else (2**20, "MiB")


# --- around growth --------------------------------------------------------------------------------------------


def growth_figure(curves: Sequence[Curve], look: dict[str, Look]) -> Figure | None:
    """The training loss around each growth, and the loss just before and after it on the same validation windows."""
    windows = [window for drawn in curves for window in growth_windows(drawn)]
    windows = [window for window in windows if window.before and window.after][:MOST_WINDOWS]
    if not windows:
        return None
    columns = min(4, len(windows))
    rows = math.ceil(len(windows) / columns)
    with _canvas(2.35 * max(columns, 2), 0.3 + 1.95 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        height = 0.3 + 1.95 * rows
        figure.subplots_adjust(
            left=0.6 / (2.35 * max(columns, 2)), right=0.985, top=1 - 0.42 / height, bottom=0.45 / height,
            hspace=0.62, wspace=0.25,
        )  # fmt: skip
        span = _usual_span(windows)  # one scale, so that jumps can be compared
        for axes, window in zip(grid.flat, windows, strict=False):
            _draw_window(axes, window, look[window.curve.entry.entry.name])
            middle = (window.before[-1][1] + window.after[0][1]) / 2
            axes.set_ylim(middle - span / 2, middle + span / 2)
        for axes in list(grid.flat)[len(windows) :]:
            axes.set_visible(False)
        figure.supylabel("training loss, nats a token", color=MUTED, fontsize=9, x=0.005)
    return figure


def _usual_span(windows: Sequence[GrowthWindow]) -> float:
    """The range of losses that three windows of four stay within, with a margin."""
    losses = [[loss for _, loss in (*window.before, *window.after)] for window in windows]
    ranges = sorted(max(values) - min(values) for values in losses)
    return max(1.6 * ranges[int(0.75 * (len(ranges) - 1))], 0.02)


def _draw_window(axes: Axes, window: GrowthWindow, look: Look) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    clean(axes)
    for part in (window.before, window.after):
        axes.plot(*zip(*part, strict=True), color=look.ink, linewidth=1.3)
    point = window.point
    axes.axvline(point.tokens, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))
    axes.set_title(window.curve.entry.label, loc="left", fontsize=8.5, color=look.ink, fontweight="bold", pad=15)
    axes.annotate(
        f"{point.label}{_jump(point.loss_merged, point.loss_grown)}", (0, 1), xytext=(0, 4), xycoords="axes fraction",
        textcoords="offset points", fontsize=7.5, color=MUTED, va="bottom",
    )  # fmt: skip


def _jump(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f", loss {before:.2f}→{after:.2f}"


# --- memory ---------------------------------------------------------------------------------------------------


def memory_figure(entries: Sequence[EntrySummary], look: dict[str, Look]) -> Figure | None:
    """Model-state bytes of each stage over tokens: lines as planned, broad and pale as measured."""
    planned = [(entry, entry.plan) for entry in entries if entry.plan is not None]
    if not planned:
        return None
    unit, name = _unit([plan.peak_model_state_bytes for _, plan in planned])
    with _canvas() as figure:
        axes = figure.add_axes((0.07, 0.12, 0.64, 0.8))
        clean(axes)
        ends: list[tuple[float, str, Look]] = []
        for entry, plan in planned:
            style = look[entry.entry.name]
            edges, heights = [0], []
            for stage in plan.stages:
                edges.append(edges[-1] + stage.tokens)
                heights.append(stage.memory.total_bytes / unit)
            axes.step(edges, [*heights, heights[-1]], where="post", **_line(style))
            if entry.finished and entry.finished[0].record is not None:
                for span in measured_spans(entry.finished[0].record):
                    height = sum(span.bytes_by_kind.values()) / unit
                    axes.plot(
                        [span.start, span.end], [height] * 2, color=style.ink, alpha=0.2, linewidth=6,
                        solid_capstyle="butt",
                    )  # fmt: skip
            ends.append((heights[-1], f"{entry.label}  {format_bytes(plan.peak_model_state_bytes)}", style))
        axes.set_ylim(0, 1.06 * max(plan.peak_model_state_bytes for _, plan in planned) / unit)
        _numbers(axes, "tokens")
        axes.set_ylabel(f"model states, {name}")
        axes.plot([], [], color=MUTED, linewidth=1.6, label="planned")
        axes.plot([], [], color=MUTED, linewidth=6, alpha=0.3, label="measured")
        axes.legend(loc="lower left", frameon=False, labelcolor=MUTED, fontsize=8.5, ncols=2)
        axes.annotate("peak of the run", (1.07, 1), xytext=(2, 12), color=MUTED, fontsize=8.5, **OUTSIDE)
        _label_ends(axes, ends)
    return figure


# --- learning rates -------------------------------------------------------------------------------------------


def learning_rate_figure(suite: Suite, look: dict[str, Look]) -> Figure | None:
    """Validation loss over the learning rates that were tried; filled the choice, a cross at the top what diverged."""
    tuned = [entry for entry in suite.record.entries if entry.tuned]
    points = {entry.name: _tried(suite, entry.name) for entry in tuned}
    if not any(loss is not None for tried in points.values() for *_, loss in tried):
        return None
    with _canvas() as figure:
        from matplotlib.ticker import NullLocator

        axes = figure.add_axes((0.07, 0.12, 0.66, 0.83))
        clean(axes)
        axes.set_xscale("log")
        axes.set_xticks(suite.record.grid, [f"{rate:g}" for rate in suite.record.grid])
        axes.xaxis.set_minor_locator(NullLocator())
        ends = []
        for entry in tuned:
            style = look[entry.name]
            done = [(rate, loss) for rate, _, loss in points[entry.name] if loss is not None]
            if not done:
                continue
            axes.plot(*zip(*done, strict=True), **_line(style), marker="o", markersize=4.5, markerfacecolor="white")
            axes.plot(
                *zip(*[(r, x) for r, x in done if r == entry.learning_rate] or [(math.nan, math.nan)], strict=True),
                linestyle="none", marker="o", markersize=7, color=style.ink, zorder=4,
            )  # fmt: skip
            ends.append((done[-1][1], entry.label + (" (edge)" if entry.at_edge else ""), style))
        _stay_near_the_best(axes, points.values())
        top = axes.get_ylim()[1]
        for entry in tuned:
            for rate, status, _ in points[entry.name]:
                if status in ("diverged", "failed"):
                    axes.plot(rate, top, marker="x", color=look[entry.name].ink, markersize=7, clip_on=False)
        axes.set_xlabel("learning rate (filled: chosen; cross: diverged)")
        axes.set_ylabel(f"validation loss of seed {suite.record.tune_seed}, nats a token")
        _label_ends(axes, ends)
    return figure


def _stay_near_the_best(axes: Axes, tried: Iterable[Sequence[tuple[float, str, float | None]]]) -> None:
    """A rate far too high must not flatten the others: cut what is far above every entry's best."""
    losses = [[loss for *_, loss in points if loss is not None] for points in tried]
    best = [min(values) for values in losses if values]
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, max(best) + max(0.4, max(best) - min(best))))


def _tried(suite: Suite, name: str) -> list[tuple[float, str, float | None]]:
    """(rate, status, loss) over the grid."""
    runs = [(rate, tuning_run(suite, name, rate)) for rate in suite.record.grid]
    return [(rate, run.entry.status, run.validation_loss) for rate, run in runs if run is not None]
