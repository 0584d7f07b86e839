"""A figure of runs over tokens: loss in the top panel, model-state memory in the bottom one, growth marked in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.report.runs import RunRecord
from steplm.report.style import INK, KIND_COLORS, MUTED, RUN_COLORS, clean, figure_file, spread
from steplm.units import binary_unit, format_bytes, format_count, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING_SHARE = 0.015  # width (standard deviation) of the smoothing, as a share of the logged points
DASHES = (0, (4, 2))
OUTSIDE: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
CIRCLE: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 4.6,
    "markerfacecolor": "white",
    "markeredgewidth": 1.3,
}


@dataclass(frozen=True)
class Span:
    """One stage on the token axis, with the bytes by kind from its ``stage_start`` event."""

    start: float
    end: float
    bytes_by_kind: dict[str, int]


def run_figure(records: Sequence[RunRecord], path: str | Path) -> Path:
    """Draw one or more runs and write a PNG, or the format given by the suffix of ``path``.

    The top panel shows training loss (pale; the smoothed curve is strong) and validation loss (circles). The bottom
    panel shows the model-state bytes of each stage: measured filled, planned dashed; a single run is split by kind.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    path = Path(path)
    colors = [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(records))]
    with figure_file(path, (9.2, 6.0)) as figure:
        grid = figure.add_gridspec(2, 1, height_ratios=(1.4, 1), hspace=0.2)
        figure.subplots_adjust(left=0.075, right=0.8, top=0.92, bottom=0.085)
        loss_axes = figure.add_subplot(grid[0])
        memory_axes = figure.add_subplot(grid[1], sharex=loss_axes)
        for axes in (loss_axes, memory_axes):
            clean(axes)
        last_token = max((max(r.plan.total_tokens, r.tokens_seen) for r in records), default=1)
        loss_axes.set_xlim(0, last_token)
        loss_axes.tick_params(labelbottom=False)
        memory_axes.xaxis.set_major_locator(MaxNLocator(8))
        memory_axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))
        memory_axes.set_xlabel("tokens")

        _draw_losses(loss_axes, records, colors)
        _draw_memory(memory_axes, records, colors)
        _mark_growth(loss_axes, memory_axes, records, colors if len(records) > 1 else [MUTED])
    return path


# --- loss -------------------------------------------------------------------------------------------------


def _draw_losses(axes: Axes, records: Sequence[RunRecord], colors: Sequence[str]) -> None:
    ends: list[tuple[float, str, str]] = []
    shown: list[float] = []
    for record, color in zip(records, colors, strict=True):
        train, evaluations = record.training_losses, record.events_of("eval")
        width = SMOOTHING_SHARE * len(train)
        for stage in record.plan.stages:  # smoothed separately, so that a jump at growth stays a jump
            tokens = [seen for seen, _, index in train if index == stage.index]
            losses = [loss for _, loss, index in train if index == stage.index]
            axes.plot(tokens, losses, color=color, alpha=0.22, linewidth=0.8)
            axes.plot(tokens, smoothed(losses, width), color=color, linewidth=1.7, solid_capstyle="round")
        validation = [event["loss"] for event in evaluations]
        seen_at = [event["tokens_seen"] for event in evaluations]
        axes.plot(seen_at, validation, color=color, **CIRCLE, zorder=4, clip_on=False)
        # The first steps fall from log(vocabulary size); at full scale they would flatten the rest.
        after_start = [loss for seen, loss, _ in train if seen >= record.tokens_seen / 20]
        shown += smoothed(after_start, width) + validation
        if train or validation:
            last = validation[-1] if validation else train[-1][1]
            perplexity = record.validation_perplexity
            result = f"loss {last:.2f}" if perplexity is None else f"perplexity {perplexity:.2f}"
            so_far = "" if record.summary else " so far"
            ends.append((last, f"{record.label}\n{result}{so_far}", color))
    if shown:
        low, high = min(shown), max(shown)
        margin = max(high - low, 0.1)
        axes.set_ylim(low - 0.1 * margin, high + 0.12 * margin)
    axes.set_ylabel("loss, nats per token")
    _label_ends(axes, ends, gap=0.14)
    styles = {"training, smoothed": {"linewidth": 1.7}, "validation": CIRCLE}
    _legend(axes, {label: {"color": MUTED, **style} for label, style in styles.items()}, loc="upper right")


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Mean under a centered Gaussian window of standard deviation ``width`` points, truncated at both ends."""
    from scipy.ndimage import gaussian_filter1d

    if not values or not width:
        return list(values)
    total, weight = (gaussian_filter1d(x, width, mode="constant", truncate=3) for x in (values, [1.0] * len(values)))
    return (total / weight).tolist()


def _legend(axes: Axes, lines: dict[str, dict[str, Any]], **where: Any) -> None:
    from matplotlib.lines import Line2D

    axes.legend(
        handles=[Line2D([], [], label=label, **line) for label, line in lines.items()],
        facecolor="white",
        edgecolor="none",
        framealpha=0.9,
        labelcolor=MUTED,
        fontsize=8.5,
        handlelength=1.8,
        borderaxespad=0,
        **where,
    )


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Label curves to the right of the axes, at the heights where they end, spread to avoid overlap."""
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for value, _, _ in ends], gap, 0.03, 0.97)
    for height, (_, text, color) in zip(heights, ends, strict=True):
        name, _, result = text.partition("\n")
        axes.annotate(name, (1, height), xytext=(10, 1), va="bottom", color=color, fontweight="bold", **OUTSIDE)
        axes.annotate(result, (1, height), xytext=(10, -1), va="top", color=MUTED, fontsize=8.5, **OUTSIDE)


# --- memory -----------------------------------------------------------------------------------------


def measured_spans(record: RunRecord) -> list[Span]:
    """Bytes measured at the start of each stage, each span ending at the next start or the run's latest token."""
    entrances, seen = [], 0
    for event in record.events:
        seen = event.get("tokens_seen") or seen
        if event["event"] == "stage_start":
            entrances.append((seen, {kind: n for kind, n in event["measured_bytes"].items() if kind != "total"}))
    ends = [*(start for start, _ in entrances[1:]), record.tokens_seen]
    return [Span(start, end, by_kind) for (start, by_kind), end in zip(entrances, ends, strict=False)]


def _draw_memory(axes: Axes, records: Sequence[RunRecord], colors: Sequence[str]) -> None:
    vanilla = {record.plan.vanilla_model_state_bytes for record in records}
    peaks = {record.plan.peak_model_state_bytes for record in records}
    unit_name, unit = binary_unit(max(vanilla))
    axes.set_ylim(0, max(vanilla | peaks) / unit * 1.15)
    axes.set_ylabel(f"model states, {unit_name}")
    for reference in vanilla - peaks:
        axes.axhline(reference / unit, color=MUTED, linewidth=1.0, zorder=3)
        axes.annotate(
            f"vanilla {format_bytes(reference)}",
            (0, reference / unit),
            xytext=(5, 3.5),
            textcoords="offset points",
            va="bottom",
            color=MUTED,
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    if len(records) == 1:
        _draw_memory_by_kind(axes, records[0], unit)
        measured, planned_color = {"color": KIND_COLORS["optimizer"], "linewidth": 6}, INK
    else:
        _draw_memory_outlines(axes, records, colors, unit)
        measured, planned_color = {"color": MUTED, "alpha": 0.35, "linewidth": 5.5}, MUTED
    planned = {"color": planned_color, "linewidth": 1.3, "linestyle": (0, (3, 1.5))}
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1.0), "ncols": 2, "columnspacing": 1.6}
    _legend(axes, {"measured": measured, "planned": planned}, **place)


def _planned_outline(record: RunRecord, unit: float) -> tuple[list[float], list[float]]:
    tokens: list[float] = []
    heights: list[float] = []
    for stage in record.plan.stages:
        start = tokens[-1] if tokens else 0
        tokens += [start, start + stage.tokens]
        heights += [stage.memory.total_bytes / unit] * 2
    return tokens, heights


def _draw_memory_by_kind(axes: Axes, record: RunRecord, unit: int) -> None:
    plan = record.plan
    labels: list[tuple[float, str, str | None]] = []  # height, text and color; the saving has no color
    for span in measured_spans(record):
        base = 0.0
        labels = []  # those of the last stage remain
        for kind, color in KIND_COLORS.items():
            height = span.bytes_by_kind.get(kind, 0) / unit
            if height:
                axes.fill_between([span.start, span.end], base, base + height, color=color, linewidth=0)
                digits = max(0, 3 - len(str(int(height))))
                labels.append((base + height / 2, f"{kind}  {height:.{digits}f}", color))
            base += height
    axes.plot(*_planned_outline(record, unit), color=INK, linewidth=1.2, linestyle=DASHES, zorder=5)
    top = axes.get_ylim()[1]
    if plan.reduction > 0:
        peak, vanilla = plan.peak_model_state_bytes / unit, plan.vanilla_model_state_bytes / unit
        arrow = {"arrowstyle": "->", "color": INK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0}
        ends: dict[str, Any] = {"xy": (1.018, peak / top), "xytext": (1.018, vanilla / top)}
        axes.annotate("", **ends, xycoords="axes fraction", annotation_clip=False, arrowprops=arrow)
        labels.append(((peak + vanilla) / 2, percent(-plan.reduction), None))
    heights = spread([value / top for value, *_ in labels], 0.105, 0.04, 0.96)
    for height, (_, text, kind_color) in zip(heights, labels, strict=True):
        weight = "bold" if kind_color is None else "normal"
        axes.annotate(text, (1, height), xytext=(22, 0), fontsize=8.5, va="center", fontweight=weight, **OUTSIDE)
        if kind_color is not None:
            axes.annotate("■", (1, height), xytext=(10, 0), color=kind_color, va="center", **OUTSIDE)


def _draw_memory_outlines(axes: Axes, records: Sequence[RunRecord], colors: Sequence[str], unit: int) -> None:
    ends = []
    for record, color in zip(records, colors, strict=True):
        spans, plan = measured_spans(record), record.plan
        tokens = [edge for span in spans for edge in (span.start, span.end)]
        totals = [sum(span.bytes_by_kind.values()) / unit for span in spans for _ in range(2)]
        axes.plot(tokens, totals, color=color, alpha=0.28, linewidth=5.5, solid_capstyle="butt")
        axes.plot(*_planned_outline(record, unit), color=color, linewidth=1.5, linestyle=DASHES, zorder=5)
        saving = f", {percent(-plan.reduction)}" if plan.reduction else ""
        text = f"{record.label}\npeak {format_bytes(plan.peak_model_state_bytes)}{saving}"
        ends.append((plan.stages[-1].memory.total_bytes / unit, text, color))
    _label_ends(axes, ends, gap=0.2)


# --- growth -----------------------------------------------------------------------------------------


def _mark_growth(top: Axes, bottom: Axes, records: Sequence[RunRecord], colors: Sequence[str]) -> None:
    """Draw dashed lines through both panels, with labels above in as many rows as it takes to avoid overlap."""
    half = 0.075 * top.get_xlim()[1]  # of the width of a label
    row_ends: list[float] = []
    marks = [
        (event["tokens_seen"], growth_label(record, event["stage"]), color)
        for record, color in zip(records, colors, strict=True)
        for event in record.events_of("growth")
    ]
    for tokens, text, color in sorted(marks):
        for axes in (top, bottom):
            axes.axvline(tokens, color=color, linewidth=0.9, linestyle=(0, (3, 3)), zorder=2, alpha=0.8)
        row = next((i for i, end in enumerate(row_ends) if tokens - half >= end), len(row_ends))
        row_ends[row : row + 1] = [tokens + half]
        top.annotate(
            text, (tokens, 1), xycoords=("data", "axes fraction"), xytext=(0, 4 + 12 * row),
            textcoords="offset points", ha="center", va="bottom", color=color, fontsize=8.5,
        )  # fmt: skip


def growth_label(record: RunRecord, stage_index: int) -> str:
    """``'8→12 layers'`` for the growth into a stage (2 or later)."""
    before, after = record.plan.stages[stage_index - 2], record.plan.stages[stage_index - 1]
    return f"{before.num_hidden_layers}→{after.num_hidden_layers} layers"
