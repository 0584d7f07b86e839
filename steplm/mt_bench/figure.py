"""A radar of the single scores by category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from steplm.files import replacing
from steplm.mt_bench.parse import HIGHEST
from steplm.mt_bench.scores import ALL, Scores
from steplm.report.style import FAINT, MUTED, RC, RUN_COLOURS

LEAST_CATEGORIES = 3  # fewer make no polygon
_RINGS = (2, 4, 6, 8, 10)


def radar_figure(scores: Scores, path: Path) -> Path | None:
    """Draw the mean over both turns, an axis a category and a line a model; ``None`` where there is too little.

    A category without a judgment leaves a gap in its line; a hollow point is of fewer answers than there should be.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(score.model for score in scores.singles))
    categories = [name for name in dict.fromkeys(score.category for score in scores.singles) if name != ALL]
    if len(categories) < LEAST_CATEGORIES or not any(score.score.judged for score in scores.singles):
        return None
    angles = [2 * math.pi * i / len(categories) for i in range(len(categories))]
    with rc_context(RC):
        figure = Figure(figsize=(8.2, 5.2), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.12, 0.09, 0.54, 0.82), projection="polar")
        axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        axes.set_ylim(0, HIGHEST)
        axes.spines["polar"].set_visible(False)
        axes.grid(False)
        for ring in _RINGS:
            _polygon(axes, angles, [ring] * len(angles), color=FAINT if ring < HIGHEST else "#b4bcc6", linewidth=0.8)
            axes.annotate(
                str(ring), (0, ring), xytext=(3, -9), textcoords="offset points", color=MUTED, fontsize=7.5, zorder=5
            )
        for angle in angles:
            axes.plot([angle, angle], [0, HIGHEST], color=FAINT, linewidth=0.8, zorder=1)
        axes.set_yticks([])
        axes.set_xticks([])
        for angle, name in zip(angles, categories, strict=True):
            right, up = math.sin(angle), math.cos(angle)
            axes.annotate(
                name,
                (angle, HIGHEST),
                xytext=(8 * right, 10 * up),
                textcoords="offset points",
                ha="center" if abs(right) < 0.1 else "left" if right > 0 else "right",
                va="center",
            )
        for number, model in enumerate(models):
            colour = RUN_COLOURS[number % len(RUN_COLOURS)]
            means = [scores.single(model, name).score for name in categories]
            values = [math.nan if mean.mean is None else mean.mean for mean in means]
            _polygon(axes, angles, values, color=colour, linewidth=1.7, zorder=3)
            if len(models) <= 2 and not any(map(math.isnan, values)):
                axes.fill(angles, values, color=colour, alpha=0.09, linewidth=0)
            for angle, value, mean in zip(angles, values, means, strict=True):
                face = colour if mean.complete else "white"
                axes.plot(
                    angle, value, "o", markersize=4.2, color=colour, markerfacecolor=face, zorder=4, clip_on=False
                )
            overall = scores.single(model).score
            result = "nothing judged" if overall.mean is None else f"{overall.mean:.2f} of {HIGHEST}"
            if not overall.complete and overall.mean is not None:
                result += f", {overall.judged} of {overall.expected} judged"
            top = 0.8 - 0.085 * number
            name = model if len(model) <= 26 else f"{model[:25]}…"
            figure.text(0.79, top, name, color=colour, fontweight="bold", va="bottom")
            figure.text(0.79, top - 0.008, result, color=MUTED, fontsize=8.5, va="top")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    return path


def _polygon(axes, angles: Sequence[float], values: Sequence[float], **line) -> None:  # type: ignore[no-untyped-def]
    axes.plot([*angles, angles[0]], [*values, values[0]], solid_joinstyle="round", **line)
