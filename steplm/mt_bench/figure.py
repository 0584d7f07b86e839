"""A radar chart of the single scores by category."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from steplm.files import replacing
from steplm.mt_bench.parse import HIGHEST
from steplm.mt_bench.scores import ALL, Scores
from steplm.report.style import FAINT, MUTED, RUN_COLORS, figure_file

LEAST_CATEGORIES = 3  # fewer make no polygon


def radar_figure(scores: Scores, path: Path) -> Path | None:
    """Draw the mean over both turns, one axis per category and one line per model; ``None`` if there is too little.

    A category without a judgment leaves a gap in its line; a hollow point means that some judgments are missing.
    """
    found = scores.of("score")
    categories = list(dict.fromkeys(name for of in found.values() for name, _ in of if name != ALL))
    if len(categories) < LEAST_CATEGORIES or not any(of[ALL, None].judged for of in found.values()):
        return None
    angles = [2 * math.pi * i / len(categories) for i in range(len(categories))]
    closed = [*angles, angles[0]]
    saved: dict[str, Any] = {"format": "png", "bbox_inches": "tight", "pad_inches": 0.15}  # names may be long
    with replacing(path) as temporary, figure_file(temporary, (8.2, 5.2), **saved) as figure:
        axes = figure.add_axes((0.12, 0.09, 0.54, 0.82), projection="polar")
        axes.set(theta_offset=math.pi / 2, theta_direction=-1, ylim=(0, HIGHEST), xticks=[], yticks=[])
        axes.spines["polar"].set_visible(False)
        axes.grid(False)
        for ring in range(2, HIGHEST + 1, 2):
            axes.plot(closed, [ring] * len(closed), color=FAINT if ring < HIGHEST else "#b4bcc6", linewidth=0.8)
            axes.annotate(str(ring), (0, ring), (3, -9), textcoords="offset points", color=MUTED, fontsize=7.5)
        for angle, name in zip(angles, categories, strict=True):
            axes.plot([angle, angle], [0, HIGHEST], color=FAINT, linewidth=0.8, zorder=1)
            right, up = math.sin(angle), math.cos(angle)
            side = "center" if abs(right) < 0.1 else "left" if right > 0 else "right"
            axes.annotate(
                name, (angle, HIGHEST), (8 * right, 10 * up), textcoords="offset points", ha=side, va="center"
            )
        for number, ((model,), of) in enumerate(found.items()):
            color = RUN_COLORS[number % len(RUN_COLORS)]
            means = [of[name, None] for name in categories]
            values = [math.nan if score.mean is None else score.mean for score in means]
            axes.plot(closed, [*values, values[0]], color=color, linewidth=1.7, zorder=3)
            if len(found) <= 2 and not any(map(math.isnan, values)):
                axes.fill(angles, values, color=color, alpha=0.09, linewidth=0)
            faces = [color if score.complete else "white" for score in means]
            axes.scatter(angles, values, 18, faces, edgecolors=color, zorder=4, clip_on=False)
            overall = of[ALL, None]
            result = "nothing judged" if overall.mean is None else f"{overall.mean:.2f} of {HIGHEST}"
            if not overall.complete and overall.mean is not None:
                result += f", {overall.judged} of {overall.expected} judged"
            top = 0.8 - 0.085 * number
            figure.text(0.79, top, model, color=color, fontweight="bold", va="bottom")
            figure.text(0.79, top - 0.008, result, color=MUTED, fontsize=8.5, va="top")
    return path
