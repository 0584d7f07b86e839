"""The charts of a suite as plain data, drawn with Plotly on the page (``page.js``) and with Matplotlib in files.

A trace's ``x`` is a list, or a dict of lists by axis if the reader may choose the axis. Roles: ``line``, ``band``
(``low`` to ``high``), ``faint`` (training loss), ``growth``, ``step``, ``planned``, ``measured``, ``point``,
``frontier``, ``area``, ``rates``, ``diverged``, ``bars``. ``ends``, for the files, has each line label's value, text
and entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from steplm.report.curves import AXES, Curve, Look, curve, frontier, growth_windows, loss_range
from steplm.report.figure import measured_spans
from steplm.report.labels import RADII, USUAL_FONT, USUAL_SIZE, anchor, place_labels
from steplm.report.style import KIND_COLORS
from steplm.report.suite import Question
from steplm.report.summary import EntrySummary, Estimate, Suite
from steplm.report.tables import tuning_run
from steplm.units import binary_unit, format_bytes, format_count, format_seconds

MOST_TRAINING_POINTS = 400
MOST_LENGTH_TICKS = 10
FEW_POINTS = 12  # lines with at most this many points get a marker on each


def all_charts(suite: Suite, look: dict[str, Look]) -> list[dict[str, Any]]:
    """Every chart that has data, in the order of the page; ``section`` is the part of the page that shows it."""
    charts = []
    for number, question in enumerate(suite.record.questions, start=1):
        charts += question_charts(suite, question, number, look)
    return charts + [chart for chart in (rates_chart(suite), documents_chart(suite)) if chart is not None]


def question_charts(suite: Suite, question: Question, number: int, look: dict[str, Look]) -> list[dict[str, Any]]:
    """The loss, trade-off, memory and growth charts that have data."""
    entries = suite.of(question)
    curves = [c for entry in entries if (c := curve(entry)) is not None]
    charts = [loss_chart(curves), tradeoff_chart(entries, look), memory_chart(entries), growth_chart(curves)]
    section = f"q{number}"
    return [{"id": f"{section}-{c['kind']}", "section": section, **c} for c in charts if c is not None]


def loss_chart(curves: Sequence[Curve]) -> dict[str, Any] | None:
    """Validation loss over tokens, FLOPs or time; for a single entry, the training loss too."""
    if not curves:
        return None
    longest = max((s for c in curves for s in c.training.seconds), default=0.0)
    seconds, unit = (60.0, "minutes") if longest >= 180 else (1.0, "seconds")
    if longest >= 10800:
        seconds, unit = 3600.0, "hours"
    traces: list[dict[str, Any]] = []
    ends = []

    def x_of(series: Any, keep: Sequence[int]) -> dict[str, list[float]]:
        by_axis = {axis: [getattr(series, axis)[i] for i in keep] for axis in AXES}
        return {**by_axis, "seconds": [value / seconds for value in by_axis["seconds"]]}

    for drawn in curves:
        series, common = drawn.validation, {"entry": drawn.entry.entry.name}
        every = range(len(series.loss))
        if len(curves) == 1:
            some = range(0, len(drawn.training.loss), max(1, len(drawn.training.loss) // MOST_TRAINING_POINTS))
            losses = [drawn.training.loss[i] for i in some]
            traces.append({**common, "role": "faint", "x": x_of(drawn.training, some), "y": losses, "name": "training"})
        if drawn.num_seeds > 1 and len(curves) <= 6:
            band = {"low": series.low, "high": series.high}
            traces.append({**common, "role": "band", "x": x_of(series, every), **band})
        hover = [
            f"{format_count(tokens)} tokens<br>loss {loss:.4f}"
            + (f" ({low:.4f}–{high:.4f}, {drawn.num_seeds} seeds)" if drawn.num_seeds > 1 else "")
            for tokens, loss, low, high in zip(series.tokens, series.loss, series.low, series.high, strict=True)
        ]
        traces.append({**common, "role": "line", "x": x_of(series, every), "y": series.loss, "hover": hover})
        grown = {point.tokens: point for point in drawn.growths}
        at = [i for i in every if series.tokens[i] in grown]
        if at:
            notes = [_growth_note(grown[series.tokens[i]]) for i in at]
            losses = [series.loss[i] for i in at]
            traces.append({**common, "role": "growth", "x": x_of(series, at), "y": losses, "hover": notes})
        if series.loss:
            ends.append((series.loss[-1], f"{drawn.entry.label}  {series.loss[-1]:.3f}", drawn.entry.entry.name))
    return {
        "kind": "loss",
        "title": "Validation loss",
        "about": "Mean over seeds, with the extreme seeds as a band; circles: growth."
        if any(c.num_seeds > 1 for c in curves)
        else "Circles: growth.",
        "x_titles": {**AXES, "seconds": f"wall time, {unit}"},
        "y_title": "loss, nats per token",
        "y_range": loss_range(curves),
        "traces": traces,
        "ends": ends,
    }


def _growth_note(point: Any) -> str:
    parts = [point.label]
    if point.loss_before_merge is not None and point.loss_merged is not None:
        parts.append(f"merge: loss {point.loss_before_merge:.4f} → {point.loss_merged:.4f}")
    if point.loss_merged is not None and point.loss_grown is not None:
        parts.append(f"growth: loss {point.loss_merged:.4f} → {point.loss_grown:.4f}")
    return "<br>".join(parts)


def tradeoff_chart(entries: Sequence[EntrySummary], look: dict[str, Look]) -> dict[str, Any] | None:
    """Perplexity against planned peak model-state memory, with intervals and the frontier."""
    found = [
        (e, e.plan.peak_model_state_bytes, e.validation_loss.exp()) for e in entries if e.plan and e.validation_loss
    ]
    if len(found) < 2:
        return None
    name, unit = binary_unit(max(2**20, *(num_bytes for _, num_bytes, _ in found)))
    spots = [(num_bytes / unit, value.mean) for _, num_bytes, value in found]
    best = frontier(spots)
    x_range = _with_margin([x for x, _ in spots], 0.14)
    ends = [end for _, _, v in found for end in (v.low, v.high, v.mean) if end is not None]
    y_range = _with_margin(ends, 0.08)
    offsets = _label_offsets(spots, [e.label for e, *_ in found], [v for *_, v in found], x_range, y_range)
    traces: list[dict[str, Any]] = [{"role": "frontier", "x": [x for x, _ in best], "y": [y for _, y in best]}]
    for (entry, num_bytes, value), (dx, dy) in zip(found, offsets, strict=True):
        trace: dict[str, Any] = {
            "role": "point",
            "entry": entry.entry.name,
            "x": [num_bytes / unit],
            "y": [value.mean],
            "label": {
                "text": escape(entry.label),
                "plain": entry.label,
                "dx": dx,
                "dy": -dy,
                "anchor": anchor(dx),
                "far": math.hypot(dx, dy) > RADII[0] + 1,
            },
            "marker": look[entry.entry.name].marker,
            "hollow": len(entry.finished) < len(entry.runs),
            "hover": [f"{format_bytes(num_bytes)}<br>perplexity {value.mean:.2f}<br>seeds: {entry.state}"],
        }
        if value.low is not None and value.high is not None:
            trace["error"] = [value.high - value.mean, value.mean - value.low]
            trace["hover"][0] += f"<br>95% interval {value.low:.2f}–{value.high:.2f}"
        traces.append(trace)
    return {
        "kind": "tradeoff",
        "title": "Perplexity against memory",
        "about": "Lower left is better; the pale line joins the points that no other beats in both. "
        "Bars: 95% interval over seeds; hollow: seeds are missing.",
        "x_title": f"peak model-state memory, {name}",
        "y_title": "validation perplexity",
        "x_range": x_range,
        "y_range": y_range,
        "traces": traces,
        "ends": [],
    }


def _with_margin(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = share * (high - low or 0.1 * high)
    return low - margin, high + margin


def _label_offsets(
    spots: Sequence[tuple[float, float]],
    texts: Sequence[str],
    values: Sequence[Estimate],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> list[tuple[float, float]]:
    """Offsets of the labels, for a drawing of ``USUAL_SIZE`` pixels."""

    def place(x: float, y: float) -> tuple[float, float]:
        shares = (x - x_range[0]) / (x_range[1] - x_range[0]), (y - y_range[0]) / (y_range[1] - y_range[0])
        return shares[0] * USUAL_SIZE[0], shares[1] * USUAL_SIZE[1]

    bars = [
        (*place(x, v.low), *place(x, v.high))
        for (x, _), v in zip(spots, values, strict=True)
        if v.low is not None and v.high is not None
    ]
    obstacles = [(x0 - 1, y0, x1 + 1, y1) for x0, y0, x1, y1 in bars]
    return place_labels([place(*spot) for spot in spots], texts, USUAL_SIZE, font_size=USUAL_FONT, obstacles=obstacles)


def memory_chart(entries: Sequence[EntrySummary]) -> dict[str, Any] | None:
    """Model-state bytes over tokens, planned and measured; for a single entry, by kind."""
    planned = [(entry, entry.plan) for entry in entries if entry.plan is not None]
    if not planned:
        return None
    name, unit = binary_unit(max(2**20, *(plan.peak_model_state_bytes for _, plan in planned)))
    alone = len(planned) == 1
    traces: list[dict[str, Any]] = []
    ends = []
    for entry, plan in planned:
        common = {"entry": entry.entry.name}
        edges, heights = [0], []
        for stage in plan.stages:
            edges.append(edges[-1] + stage.tokens)
            heights.append(stage.memory.total_bytes / unit)
        spans = measured_spans(entry.record) if entry.record is not None else []
        if alone:
            for kind, color in KIND_COLORS.items():
                values = [span.bytes_by_kind.get(kind, 0) / unit for span in spans for _ in range(2)]
                if any(values):
                    x = [edge for span in spans for edge in (span.start, span.end)]
                    hover = [f"{kind}<br>{format_bytes(value * unit)}" for value in values]
                    traces.append({"role": "area", "x": x, "y": values, "color": color, "name": kind, "hover": hover})
        else:
            for span in spans if entry.finished else []:
                height = sum(span.bytes_by_kind.values()) / unit
                traces.append({**common, "role": "measured", "x": [span.start, span.end], "y": [height] * 2})
        hover = [
            f"stage {stage.index}: {stage.num_hidden_layers} layers<br>planned {format_bytes(stage.memory.total_bytes)}"
            for stage in plan.stages
        ]
        traces.append(
            {
                **common,
                "role": "planned" if alone else "step",
                "x": edges,
                "y": [*heights, heights[-1]],
                "hover": [*hover, hover[-1]],
                "name": "planned",
            }
        )
        ends.append((heights[-1], f"{entry.label}  peak {format_bytes(plan.peak_model_state_bytes)}", entry.entry.name))
    return {
        "kind": "memory",
        "title": "Model-state memory",
        "about": "Filled: measured, by kind; dashed: planned." if alone else "Lines: planned; pale: measured.",
        "x_title": "tokens",
        "y_title": f"model states, {name}",
        "y_from_zero": True,
        "traces": traces,
        "ends": ends,
    }


def growth_chart(curves: Sequence[Curve]) -> dict[str, Any] | None:
    """Training loss around every growth, aligned at the growth."""
    traces: list[dict[str, Any]] = []
    ends: dict[str, tuple[float, str, str]] = {}  # by entry, from its last growth
    for drawn in curves:
        name = drawn.entry.entry.name
        for point, before, after in growth_windows(drawn):
            if not (before and after):
                continue
            for part in (before, after):
                hover = [f"{_growth_note(point)}<br>training loss {loss:.4f}" for _, loss in part]
                traces.append(
                    {
                        "role": "line",
                        "entry": name,
                        "markers": len(part) <= FEW_POINTS,
                        "x": [tokens - point.tokens for tokens, _ in part],
                        "y": [loss for _, loss in part],
                        "hover": hover,
                    }
                )
            ends[name] = (after[-1][1], drawn.entry.label, name)
    if not traces:
        return None
    return {
        "kind": "growth",
        "title": "Around growth",
        "about": "Training loss of the first seed, aligned at each growth.",
        "x_title": "tokens since the growth",
        "y_title": "training loss, nats per token",
        "mark_zero": True,
        "traces": traces,
        "ends": list(ends.values()),
    }


def rates_chart(suite: Suite) -> dict[str, Any] | None:
    """Validation loss over the learning rates tried; crosses at the top are runs without a result."""
    traces: list[dict[str, Any]] = []
    diverged: list[dict[str, Any]] = []
    ends = []
    for entry in suite.record.entries:
        tried = [(rate, tuning_run(suite, entry.name, rate)) for rate in suite.record.grid] if entry.tuned else []
        if lost := [rate for rate, run in tried if run is not None and run.entry.status in ("diverged", "failed")]:
            hover = [f"learning rate {rate:g}<br>no result" for rate in lost]
            diverged.append({"role": "diverged", "entry": entry.name, "x": lost, "hover": hover})
        done = [
            (rate, run.validation_loss) for rate, run in tried if run is not None and run.validation_loss is not None
        ]
        if not done:
            continue
        hover = [f"learning rate {rate:g}<br>loss {loss:.4f}" for rate, loss in done]
        x, y = [rate for rate, _ in done], [loss for _, loss in done]
        chosen = [rate == entry.learning_rate for rate in x]
        traces.append({"role": "rates", "entry": entry.name, "x": x, "y": y, "hover": hover, "chosen": chosen})
        ends.append((y[-1], entry.label + (" (edge)" if entry.at_edge else ""), entry.name))
    if not traces:
        return None
    best = [min(trace["y"]) for trace in traces]
    worst = max(value for trace in traces for value in trace["y"])
    low, high = min(best), min(worst, max(best) + max(0.4, max(best) - min(best)))
    margin = 0.06 * (high - low or 0.1)
    return {
        "id": "rates",
        "section": "rates-section",
        "kind": "rates",
        "title": "Learning rates",
        "about": "Large: the chosen rate." + (" Cross: no result." if diverged else ""),
        "x_title": "learning rate",
        "y_title": f"validation loss of seed {suite.record.tune_seed}, nats per token",
        "y_range": (low - margin, high + margin),
        "x_ticks": list(suite.record.grid),
        "traces": [*traces, *({**trace, "y": [high + margin] * len(trace["x"])} for trace in diverged)],
        "ends": ends,
    }


def documents_chart(suite: Suite) -> dict[str, Any] | None:
    """A histogram of the lengths of the training documents; ``None`` if there is at most one, or no run says it."""
    record = None if suite.any_run is None else suite.any_run.record
    events = [] if record is None else record.events_of("data")
    counts = events[-1]["documents_by_length"] if events else []
    total = sum(counts)
    if total < 2:
        return None
    first = next(power for power, count in enumerate(counts) if count)
    shown = range(first, len(counts))
    every = 1 + len(shown) // MOST_LENGTH_TICKS
    ticks = range(first, len(counts) + 1, every)
    hover = [
        f"{2**k:,} to {2 ** (k + 1) - 1:,} tokens<br>{counts[k]:,} documents, {counts[k] / total:.1%}" for k in shown
    ]
    return {
        "id": "documents",
        "section": "documents-section",
        "kind": "documents",
        "title": "Document lengths",
        "about": f"{total:,} training documents, with their end-of-text tokens; each bar spans a factor of two.",
        "x_title": "document length, tokens",
        "y_title": "share of documents, %",
        "x_ticks": list(ticks),
        "x_tick_labels": [f"{2**power:,}" for power in ticks],
        "y_from_zero": True,
        "traces": [
            {
                "role": "bars",
                "x": [power + 0.5 for power in shown],
                "y": [100 * counts[power] / total for power in shown],
                "color": KIND_COLORS["gradients"],
                "name": "documents",
                "hover": hover,
            }
        ],
        "ends": [],
    }


def facts(suite: Suite) -> list[tuple[str, str]]:
    """(name, value) pairs that describe what was run, for the head of the page."""
    run = suite.any_run
    result: list[tuple[str, str]] = []
    if run is not None and run.record is not None:
        config, plan = run.record.config, run.record.plan
        model = config.model
        totals = [other.record.plan.total_tokens for other in suite.runs if other.record is not None]
        tokens = " to ".join(dict.fromkeys(map(format_count, (min(totals), max(totals)))))
        result += [
            (
                "Model",
                f"{model.model_type}, {format_count(plan.shape.num_parameters())} parameters: "
                f"{plan.shape.num_hidden_layers} layers, hidden size {plan.shape.hidden_size}, "
                f"vocabulary {plan.shape.vocab_size}",
            ),
            ("Tokens", f"{tokens} a run, in sequences of {config.train.sequence_length}"),
            *([("Data", ", ".join(map(_short, config.data.train_texts)))] if config.data.train else []),
            ("Precision", plan.precision),
        ]
        environment = run.environment or {}
        if device := environment.get("device"):
            count = environment.get("num_devices") or 0
            result.append(("Device", f"{count} × {device}" if count > 1 else device))
        versions = environment.get("versions", {})
        if versions:
            result.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    seeds = suite.record.seeds
    result.append(("Seeds" if len(seeds) > 1 else "Seed", ", ".join(map(str, seeds))))
    if matched := {"tokens": "training tokens", "flops": "training FLOPs"}.get(suite.record.match):
        result.append(("Matched on", matched))
    if suite.record.grid:
        grid = ", ".join(f"{rate:g}" for rate in suite.record.grid)
        on = f"seed {suite.record.tune_seed}" if suite.record.finalists == 1 else "the mean over all seeds"
        result.append(("Learning rates", f"{grid}, chosen for each method on {on}"))
    states = [run.entry.status for run in suite.runs]
    counts = {status: states.count(status) for status in dict.fromkeys(states)}
    result.append(("Runs", ", ".join(f"{count} {status}" for status, count in counts.items())))
    elapsed = sum(run.row["elapsed_seconds"] or 0.0 for run in suite.runs)
    if elapsed:
        shared = ", counting shared stages for each" if any(run.entry.shared_from for run in suite.runs) else ""
        together = f", all runs together{shared}" if len(suite.runs) > 1 else ""
        result.append(("Time", format_seconds(elapsed) + together))
    return result


def _short(source: str) -> str:
    """The end of a path: enough to identify the data, without the folders of one machine."""
    return source if "://" in source else "/".join(Path(source).parts[-2:])
