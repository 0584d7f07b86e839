"""Data for the charts: the validation loss of an entry over tokens, FLOPs and time, and its growth points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean

import numpy as np

from steplm.report.figure import growth_label
from steplm.report.runs import RunRecord
from steplm.report.style import INK, RUN_COLORS
from steplm.report.summary import EntrySummary, Suite

AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "wall time"}
DASHES = ("solid", "dash", "dot")  # one for each pass through the colors
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")
GROWTH_WINDOW = 0.04  # share of a run's tokens shown on each side of a growth
FEWEST_POINTS = 5  # minimum number of points on each side


@dataclass(frozen=True)
class Look:
    """How every chart of a suite draws an entry; ``color`` is ``None`` for the text color."""

    color: str | None
    dash: str
    marker: str

    @property
    def ink(self) -> str:
        return self.color or INK


def looks(suite: Suite) -> dict[str, Look]:
    """The look of each entry: the baseline in the text color, the others each in their own color and dash."""
    result = {}
    others = [name for name in suite.entries if name != suite.record.baseline]
    for index, name in enumerate(others):
        turn, color = divmod(index, len(RUN_COLORS))
        result[name] = Look(RUN_COLORS[color], DASHES[turn % len(DASHES)], MARKERS[(turn + color) % len(MARKERS)])
    if suite.record.baseline is not None:
        result[suite.record.baseline] = Look(None, "solid", "circle")
    return result


@dataclass(frozen=True)
class Series:
    """Losses and their positions on each of ``AXES``; ``low`` and ``high`` are the extreme seeds."""

    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class GrowthPoint:
    """A growth on the curve: what grew, and the loss before and after it on the same few windows."""

    label: str  # "8→12 layers"
    tokens: float
    loss_before_merge: float | None
    loss_merged: float | None
    loss_grown: float | None


@dataclass(frozen=True)
class Curve:
    """One entry: the mean validation loss over its seeds, and the training loss of its first seed."""

    entry: EntrySummary
    validation: Series
    training: Series
    growths: tuple[GrowthPoint, ...]
    num_seeds: int


def curve(entry: EntrySummary) -> Curve | None:
    """The curve of an entry's finished seeds, else of its running seeds; ``None`` if there are neither."""
    runs = entry.finished or tuple(run for run in entry.runs if run.entry.status == "running")
    records = [run.record for run in runs if run.record is not None and run.record.events_of("train")]
    if not records:
        return None
    evaluations = [[(e["tokens_seen"], e["loss"]) for e in record.events_of("eval")] for record in records]
    return Curve(
        entry=entry,
        validation=_mean_series([_series(*pair) for pair in zip(records, evaluations, strict=True)]),
        training=_series(records[0], [(tokens, loss) for tokens, loss, _ in records[0].training_losses]),
        growths=growth_points(records[0]),
        num_seeds=len(records),
    )


def _series(record: RunRecord, losses: Sequence[tuple[int, float]]) -> Series:
    """The series of one run from its (tokens, loss) pairs."""
    tokens = [float(seen) for seen, _ in losses]
    return Series(tokens, flops_at(record, tokens), seconds_at(record, tokens), [loss for _, loss in losses])


def _mean_series(seeds: Sequence[Series]) -> Series:
    """Mean over seeds, at the token counts where all seeds were evaluated."""
    shared = sorted(set.intersection(*(set(series.tokens) for series in seeds)))

    def of_seeds(name: str) -> list[list[float]]:
        """For each of the shared token counts, the values of all seeds."""
        by_tokens = [dict(zip(series.tokens, getattr(series, name), strict=True)) for series in seeds]
        return [[values[tokens] for values in by_tokens] for tokens in shared]

    losses = of_seeds("loss")
    return Series(
        tokens=shared,
        flops=[fmean(values) for values in of_seeds("flops")],
        seconds=[fmean(values) for values in of_seeds("seconds")],
        loss=[fmean(values) for values in losses],
        low=[min(values) for values in losses],
        high=[max(values) for values in losses],
    )


def flops_at(record: RunRecord, tokens: Sequence[float]) -> list[float]:
    """FLOPs spent at each number of tokens; the slope in each stage is that stage's FLOPs per token."""
    stages = record.plan.stages
    ends = accumulate((stage.tokens for stage in stages), initial=0.0)
    spent = accumulate((stage.tokens * stage.flops_per_token for stage in stages), initial=0.0)
    return np.interp(tokens, list(ends), list(spent)).tolist()


def seconds_at(record: RunRecord, tokens: Sequence[float]) -> list[float]:
    """Seconds since the start at each number of tokens, interpolated linearly between logged steps."""
    train = [e for e in record.events_of("train") if "elapsed_seconds" in e]
    seen = [0.0, *(e["tokens_seen"] for e in train)]
    return np.interp(tokens, seen, [0.0, *(e["elapsed_seconds"] for e in train)]).tolist()


def growth_points(record: RunRecord) -> tuple[GrowthPoint, ...]:
    """Every growth of a run, with the merge just before it."""
    points = []
    merge: dict[str, float] = {}
    for event in record.events:
        if event["event"] == "merge":
            merge = event
        elif event["event"] == "growth":
            points.append(
                GrowthPoint(
                    growth_label(record, event["stage"]),
                    event["tokens_seen"],
                    merge.get("loss_before"),
                    event.get("loss_before"),
                    event.get("loss_after"),
                )
            )
    return tuple(points)


Losses = list[tuple[float, float]]  # (tokens, loss) of each logged step


def growth_windows(curve: Curve) -> list[tuple[GrowthPoint, Losses, Losses]]:
    """Each growth, with the training losses just before and just after it."""
    tokens = curve.training.tokens
    training = list(zip(tokens, curve.training.loss, strict=True))
    reach = GROWTH_WINDOW * max(tokens, default=0.0)
    windows = []
    for point in curve.growths:
        cut = bisect_right(tokens, point.tokens)
        near = [abs(seen - point.tokens) <= reach for seen in tokens]
        before = max(sum(near[:cut]), FEWEST_POINTS)
        after = max(sum(near[cut:]), FEWEST_POINTS)
        windows.append((point, training[max(cut - before, 0) : cut], training[cut : cut + after]))
    return windows


def loss_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The range of losses to show, without the initial fall from log(vocabulary size), which would flatten the rest."""
    shown = []
    for drawn in curves:
        series = drawn.validation
        start = (0.1 if len(curves) <= 4 else 0.25) * max(series.tokens, default=0.0)
        shown += [loss for tokens, loss in zip(series.tokens, series.loss, strict=True) if tokens > start]
    if not shown:
        return None
    margin = 0.06 * max(max(shown) - min(shown), 0.05)
    return min(shown) - margin, max(shown) + margin


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto frontier of (memory, perplexity) points, from the least memory up."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
