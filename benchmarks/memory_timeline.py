"""Plot the memory of a whole run over time: vanilla, the run, and the run with every memory option.

    python benchmarks/memory_timeline.py llama_1.2b train.per_device_train_batch_size=4 \
        train.gradient_accumulation_steps=1 --output docs/images/memory_timeline.png
    python benchmarks/memory_timeline.py corpus_10m --measured --output docs/images/memory_timeline_measured.png

Filled areas are counted on fake tensors, which takes a minute or two for 1.2B parameters, or with --measured on real
tensors on the CPU. Lines and circles show the plan.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm import load_config
from steplm.config import RunConfig
from steplm.planner.plan import Stage, as_vanilla, plan
from steplm.problems import validated
from steplm.report.figure import DASHES
from steplm.report.style import INK, KIND_COLORS, MUTED, RC, clean
from steplm.types import HOST, PeakEstimate
from steplm.units import format_bytes, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from steplm.training.timeline import Part

# From bottom to top: persistent memory first, then temporary memory.
COLORS = {
    **{kind: KIND_COLORS[kind] for kind in ("weights", "optimizer", "adapters", "gradients")},
    "rest": "#a9d5c4",
}
NAMES = {"optimizer": "optimizer states", "rest": "activations and workspace"}

# Each part of a stage in the figure: its name, its width, and the counted parts that it combines.
DRAWN_PARTS = (
    ("growth", 0.14, ("grown weights", "growth")),
    ("set-up", 0.12, ("weights of the stage", "assembly", "between steps")),
    ("forward", 0.26, ("forward",)),
    ("backward", 0.32, ("backward",)),
    ("update", 0.16, ("optimizer step",)),
)
GAP = 0.16  # between two stages; twice that between two runs
BINS = 400  # per unit of width; the highest point of each is drawn

EVERY_OPTION: dict[str, dict[str, Any]] = {
    "memory": {
        "optimizer_states": "8bit",
        "fused_backward": True,
        "frozen_weights": "nf4",
        "offload_frozen": True,
        "offload_activations": True,
    },
    "optim": {"max_grad_norm": None},
    "train": {"gradient_checkpointing": True, "gradient_accumulation_steps": 1},
}


@dataclass(frozen=True)
class DrawnPart:
    """One part of a stage: bytes by kind over time, and the highest planned bytes within it."""

    name: str
    width: float
    points: tuple[dict[str, int], ...]
    planned_bytes: int | None

    @property
    def highest(self) -> int:
        """Index of the first point with the most bytes."""
        return max(range(len(self.points)), key=lambda index: _total(self.points[index]))

    @property
    def peak_bytes(self) -> int:
        return _total(self.points[self.highest])


@dataclass(frozen=True)
class StageTimeline:
    """The counted memory of a stage, and its plan."""

    stage: Stage
    parts: tuple[DrawnPart, ...]

    @property
    def peak_bytes(self) -> int:
        return max(part.peak_bytes for part in self.parts)

    @property
    def planned_bytes(self) -> int:
        assert self.stage.peak is not None
        return self.stage.peak.total_bytes


@dataclass(frozen=True)
class RunTimeline:
    """All stages of one plan."""

    name: str
    stages: tuple[StageTimeline, ...]

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def planned_bytes(self) -> int:
        return max(stage.planned_bytes for stage in self.stages)


def timeline_figure(config: RunConfig, path: str | Path, *, measured: bool = False) -> Path:
    """Plot vanilla, the run, and the run with every memory option on one scale, in the format of the path's suffix.

    Filled areas are bytes of tensors, counted on fake tensors or, if ``measured``, on real ones on the CPU. Dashed
    lines are the planned peak of each stage; circles are the moments that the plan names.
    """
    count = partial(run_timeline, measured=measured)
    runs = [count("vanilla", as_vanilla(config)), count(_name(config), config)]
    if config.plan.num_stages > 1:
        runs.append(count("STEP, every memory option", with_every_option(config)))
    return draw_timelines(runs, path, measured=measured)


def with_every_option(config: RunConfig) -> RunConfig:
    """The run with every option that saves memory, and one micro-batch per step."""
    values = config.model_dump()
    for section, keys in EVERY_OPTION.items():
        values[section] = {**values[section], **keys}
    values["memory"]["master_weights"] = config.train.precision == "fp32"
    return validated(RunConfig, values)


def run_timeline(name: str, config: RunConfig, *, measured: bool) -> RunTimeline:
    """Count each stage of the plan: growth, setup, and the highest forward pass, backward pass and update."""
    from steplm.training.simulate import measure_timeline, simulate_timeline

    count = measure_timeline if measured else simulate_timeline
    stages = plan(config).stages
    return RunTimeline(
        name, tuple(StageTimeline(stage, _drawn_parts(stage, count(config, stage.highest_phase))) for stage in stages)
    )


def _name(config: RunConfig) -> str:
    stages = config.plan.num_stages
    return f"STEP, {stages} stages" if stages > 1 else "as configured"


def _drawn_parts(stage: Stage, counted: Sequence[Part]) -> tuple[DrawnPart, ...]:
    """The parts in the order of ``DRAWN_PARTS``; of parts with the same name, the last one with the highest peak."""
    assert stage.peak is not None
    highest: dict[str, Part] = {}
    for part in counted:
        if part.name not in highest or part.peak_bytes >= highest[part.name].peak_bytes:
            highest[part.name] = part
    grown, drawn = stage.grows, []
    for name, width, names in DRAWN_PARTS:
        points = [point for part in names if part in highest for point in highest[part].points]
        if points and (grown or name != "growth"):
            drawn.append(DrawnPart(name, width, tuple(points), _planned(stage.peak, name)))
    return tuple(drawn)


def _planned(peak: PeakEstimate, part: str) -> int | None:
    beginnings = {"growth": "growth", "forward": "loss", "backward": "backward", "update": "optimizer step"}
    if part not in beginnings:
        return None
    return max(i.memory.total_bytes for i in peak.instants if i.name.startswith(beginnings[part]))


def _total(by_kind: dict[str, int]) -> int:
    return sum(count for kind, count in by_kind.items() if kind != HOST)


# --- drawing ----------------------------------------------------------------------------------------


def draw_timelines(runs: Sequence[RunTimeline], path: str | Path, *, measured: bool) -> Path:
    """Plot the runs side by side; the first is the reference for the others."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reference = runs[0].planned_bytes
    unit, unit_name = (2**30, "GiB") if reference >= 2**30 else (2**20, "MiB")
    with rc_context(RC):
        figure = Figure(figsize=(9.6, 5.3), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.062, 0.225, 0.925, 0.67))
        clean(axes)
        axes.spines["bottom"].set_visible(False)
        axes.set_ylim(0, 1.1 * max(reference, *(run.peak_bytes for run in runs)) / unit)
        axes.set_ylabel(f"tensors on the device, {unit_name}")
        axes.set_xticks([])
        x = 0.0
        for run in runs:
            start = x
            for stage in run.stages:
                x = _draw_stage(axes, stage, x, unit, alone=len(run.stages) == 1) + GAP
            _heading(axes, run, (start + x - GAP) / 2, reference)
            x += GAP
        axes.set_xlim(-GAP / 2, x - 1.5 * GAP)
        axes.axhline(reference / unit, color=MUTED, linewidth=0.9, zorder=1)
        axes.annotate(
            f"planned peak of {runs[0].name}", (x - 1.5 * GAP, reference / unit), xytext=(0, 4),
            textcoords="offset points", ha="right", color=MUTED, fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
        _legend(axes, "measured" if measured else "simulated")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _draw_stage(axes: Axes, timeline: StageTimeline, start: float, unit: float, *, alone: bool) -> float:
    """Draw one stage from ``start`` on, and return where it ends."""
    x = start
    small: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False, "color": MUTED}
    below = ("data", "axes fraction")
    for part in timeline.parts:
        positions, points = _thinned(part, x)
        base = [0.0] * len(points)
        for kind, color in COLORS.items():
            top = [low + point.get(kind, 0) / unit for low, point in zip(base, points, strict=True)]
            axes.fill_between(positions, base, top, color=color, linewidth=0, zorder=2)
            base = top
        if x > start:
            axes.vlines(x, 0, base[0], color="white", linewidth=0.7, zorder=3)
        if part.planned_bytes is not None:
            at = x + part.width * (part.highest + 0.5) / len(part.points)
            axes.plot(at, part.planned_bytes / unit, **_circle(), zorder=5)
        axes.annotate(
            part.name, (x + part.width / 2, 0), xytext=(0, -4), xycoords=below,
            rotation=90, ha="center", va="top", fontsize=7.5, **small,
        )  # fmt: skip
        x += part.width
    axes.plot([start, x], [0, 0], color="#b4bcc6", linewidth=0.8, zorder=4, clip_on=False)
    planned = timeline.planned_bytes / unit
    axes.plot([start, x], [planned] * 2, color=INK, linewidth=1.2, linestyle=DASHES, zorder=4)
    axes.annotate(
        f"{planned:.2f}" if planned < 100 else f"{planned:.1f}", ((start + x) / 2, planned), xytext=(0, 5),
        textcoords="offset points", ha="center", va="bottom", fontweight="bold", zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip
    stage = timeline.stage
    trained = "all" if stage.num_new_layers == stage.num_hidden_layers else str(stage.num_new_layers)
    where: dict[str, Any] = {"xycoords": below, "ha": "center", "va": "top"}
    title = "one stage" if alone else f"stage {stage.index}"
    axes.annotate(
        title,
        ((start + x) / 2, 0),
        xytext=(0, -51),
        textcoords="offset points",
        **where,
    )
    text = f"{stage.num_hidden_layers} layers,\n{trained} trained"
    axes.annotate(text, ((start + x) / 2, 0), xytext=(0, -63), fontsize=8, **where, **small)
    return x


def _thinned(part: DrawnPart, start: float) -> tuple[list[float], list[dict[str, int]]]:
    """Downsample: the start and end position of each of many short spans, with the highest point in it."""
    num_bins = min(len(part.points), max(1, round(BINS * part.width)))
    edges = [round(index * len(part.points) / num_bins) for index in range(num_bins + 1)]
    positions, points = [], []
    for index, (low, high) in enumerate(pairwise(edges)):
        highest = max(part.points[low:high], key=_total)
        positions += [start + part.width * (index + side) / num_bins for side in (0, 1)]
        points += [highest] * 2
    return positions, points


def _heading(axes: Axes, run: RunTimeline, middle: float, reference: int) -> None:
    saving = f", {percent(run.planned_bytes / reference - 1)}" if run.planned_bytes != reference else ""
    where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    axes.annotate(run.name, (middle, 1), xytext=(0, 17), fontsize=10.5, fontweight="bold", **where)
    axes.annotate(f"peak {format_bytes(run.planned_bytes)}{saving}", (middle, 1), xytext=(0, 4), color=MUTED, **where)


def _circle() -> dict[str, Any]:
    return {
        "linestyle": "none",
        "marker": "o",
        "markersize": 4.6,
        "markerfacecolor": "white",
        "markeredgecolor": INK,
        "markeredgewidth": 1.1,
    }


def _legend(axes: Axes, counted: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [Patch(color=color, label=NAMES.get(kind, kind)) for kind, color in reversed(COLORS.items())]
    planned = [
        Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHES, label="planned peak of the stage"),
        Line2D([], [], **_circle(), label="planned moments"),
    ]
    common: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 1, "fontsize": 8.5}
    axes.legend(
        handles=[*kinds, *planned], loc="upper right", bbox_to_anchor=(1.0, 0.88), title=f"filled: {counted}",
        alignment="left", title_fontsize=8.5, labelcolor=MUTED, **common,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, default=Path("docs/images/memory_timeline.png"))
    parser.add_argument("--measured", action="store_true", help="on real tensors, on the CPU: small models only")
    arguments = parser.parse_args()
    config = load_config(arguments.run, arguments.overrides)
    print(timeline_figure(config, arguments.output, measured=arguments.measured))


if __name__ == "__main__":
    main()
