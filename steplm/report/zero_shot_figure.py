"""A figure of each model's accuracy on each task, with 95% intervals and the accuracy of random guessing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steplm.eval.zero_shot import ZeroShotResults
from steplm.report.style import FAINT, INK, MUTED, RUN_COLORS, clean, figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUP_WIDTH = 0.8  # share of the distance between tasks
NORMAL_95 = 1.96  # standard errors on either side
MOST_VALUES = 36  # most bars that leave room for a number on each


def accuracy_figure(results: ZeroShotResults, path: Path) -> bool:
    """Draw the primary accuracy of every task as bars, one color per model; return False if no task has one."""
    groups = _groups(results)
    if not groups:
        return False
    num_bars = len(groups) * len(results.models)
    width = min(max(5.2, 1.6 + 0.36 * num_bars + 0.45 * len(groups)), 16)
    with figure_file(path, (width, 4.2), bbox_inches="tight", pad_inches=0.15) as figure:
        axes = figure.add_subplot()
        clean(axes)
        for index, model in enumerate(results.models):
            _draw_model(axes, results, model, index, groups)
        _draw_chance(axes, groups)
        names = [f"{task}\n{metric}" if metric else task for task, metric, *_ in groups]
        axes.set_xticks(range(len(groups)), names, color=INK)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_ylim(0, min(100, axes.get_ylim()[1]))
        axes.set_ylabel("accuracy, %   (bars: 95% interval)")
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.01), ncols=min(4, len(results.models) + 1), frameon=False,
            labelcolor=MUTED, fontsize=8.5, borderaxespad=0, handlelength=1.4,
        )  # fmt: skip
    return True


def _groups(results: ZeroShotResults) -> list[tuple[str, str, float | None]]:
    """Task, metric and chance of each group of bars; the average comes last."""
    groups: list[tuple[str, str, float | None]] = []
    for task in results.tasks:
        first = results.of(task)[0]
        if first.primary_metric is not None:
            groups.append((task, first.primary_metric, first.chance))
    if results.averaged:
        groups.append(("average", "", None))
    return groups


def _draw_model(
    axes: Axes, results: ZeroShotResults, model: str, index: int, groups: list[tuple[str, str, float | None]]
) -> None:
    width = GROUP_WIDTH / len(results.models)
    color = RUN_COLORS[index % len(RUN_COLORS)]
    for place, (task, metric, _) in enumerate(groups):
        if metric:
            score = results.by_model_and_task[model, task].metrics[metric]
            value, stderr = score.value, score.stderr
        else:
            value, stderr = results.average(model)
        x = place - GROUP_WIDTH / 2 + (index + 0.5) * width
        label = results.labels[model] if place == 0 else None
        axes.bar(x, 100 * value, 0.92 * width, color=color, label=label, zorder=2)
        error = 100 * NORMAL_95 * (stderr or 0.0)
        axes.errorbar(
            x, 100 * value, [[min(error, 100 * value)], [error]], color=INK, linewidth=0.9, capsize=2, zorder=4
        )
        if len(groups) * len(results.models) <= MOST_VALUES:
            axes.annotate(
                f"{100 * value:.1f}", (x, 100 * value + error), xytext=(0, 3), textcoords="offset points", ha="center",
                color=MUTED, fontsize=7, zorder=3.5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.2},
            )  # fmt: skip


def _draw_chance(axes: Axes, groups: list[tuple[str, str, float | None]]) -> None:
    shown = [(place, chance) for place, (_, _, chance) in enumerate(groups) if chance is not None]
    for number, (place, chance) in enumerate(shown):
        ends = (place - 0.45, place + 0.45)
        axes.plot(ends, [100 * chance] * 2, color=FAINT, linewidth=2.4, zorder=2.5)  # also visible on dark bars
        label = "guessing" if number == 0 else None
        axes.plot(ends, [100 * chance] * 2, color=INK, linewidth=1.0, linestyle=(0, (3, 2)), zorder=3, label=label)
