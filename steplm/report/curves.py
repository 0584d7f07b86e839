"""Data for the charts: the validation loss of an entry over tokens, FLOPs and time, and its growth points."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from steplm.report.figure import growth_label
from steplm.report.runs import RunRecord
from steplm.report.style import INK, RUN_COLORS
from steplm.report.summary import EntrySummary, Suite, SuiteRun

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

    tokens: tuple[float, ...]
    flops: tuple[float, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def on(self, axis: str) -> tuple[float, ...]:
        return {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}[axis]


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
    runs = list(entry.finished) or [run for run in entry.runs if run.entry.status == "running"]
    runs = [run for run in runs if run.record is not None and run.record.events_of("train")]
    if not runs:
        return None
    first = runs[0]
    assert first.record is not None
    return Curve(
        entry=entry,
        validation=_mean_series(
            [
                _series(run, [(e["tokens_seen"], e["loss"]) for e in run.record.events_of("eval")])
                for run in runs
                if run.record
            ]
        ),
        training=_series(first, [(tokens, loss) for tokens, loss, _ in first.record.training_losses]),
        growths=growth_points(first.record),
        num_seeds=len(runs),
    )


def _series(run: SuiteRun, losses: Sequence[tuple[int, float]]) -> Series:
    """The series of one run from its (tokens, loss) pairs."""
    assert run.record is not None
    tokens = tuple(float(seen) for seen, _ in losses)
    flops, seconds = flops_at(run), seconds_at(run.record)
    return Series(tokens, tuple(map(flops, tokens)), tuple(map(seconds, tokens)), tuple(loss for _, loss in losses))


def _mean_series(seeds: Sequence[Series]) -> Series:
    """Mean over seeds, at the token counts where all seeds were evaluated."""
    shared = sorted(set.intersection(*(set(series.tokens) for series in seeds)))
    at = [{tokens: index for index, tokens in enumerate(series.tokens)} for series in seeds]

    def over_seeds(name: str, reduce: Callable[[Sequence[float]], float]) -> tuple[float, ...]:
        return tuple(
            reduce([getattr(series, name)[where[tokens]] for series, where in zip(seeds, at, strict=True)])
            for tokens in shared
        )

    mean = statistics.fmean
    return Series(
        tokens=tuple(shared),
        flops=over_seeds("flops", mean),
        seconds=over_seeds("seconds", mean),
        loss=over_seeds("loss", mean),
        low=over_seeds("loss", min),
        high=over_seeds("loss", max),
    )


def flops_at(run: SuiteRun) -> Callable[[float], float]:
    """A function from tokens seen to FLOPs spent; its slope in each stage is that stage's FLOPs per token."""
    assert run.record is not None
    stages, costs = run.record.plan.stages, run.stage_flops_per_token
    starts = [0, *accumulate(stage.tokens for stage in stages)]
    spent = [0, *accumulate(stage.tokens * cost for stage, cost in zip(stages, costs, strict=True))]

    def at(tokens: float) -> float:
        index = min(bisect_right(starts, tokens), len(stages)) - 1
        return spent[index] + (tokens - starts[index]) * costs[index]

    return at


def seconds_at(record: RunRecord) -> Callable[[float], float]:
    """A function from tokens seen to seconds since the start, interpolated linearly between logged steps."""
    train = [e for e in record.events_of("train") if "elapsed_seconds" in e]
    tokens = [0.0, *(e["tokens_seen"] for e in train)]
    seconds = [0.0, *(e["elapsed_seconds"] for e in train)]

    def at(position: float) -> float:
        index = min(max(bisect_right(tokens, position), 1), len(tokens) - 1)
        if index == 0 or tokens[index] == tokens[index - 1]:
            return seconds[index]
        share = min((position - tokens[index - 1]) / (tokens[index] - tokens[index - 1]), 1.0)
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])

    return at


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


@dataclass(frozen=True)
class GrowthWindow:
    """Training loss around one growth, one loss per logged step."""

    curve: Curve
    point: GrowthPoint
    before: tuple[tuple[float, float], ...]  # (tokens, loss)
    after: tuple[tuple[float, float], ...]


def growth_windows(curve: Curve) -> list[GrowthWindow]:
    """A window of training loss on both sides of each growth."""
    training = list(zip(curve.training.tokens, curve.training.loss, strict=True))
    reach = GROWTH_WINDOW * max(curve.training.tokens, default=0.0)
    windows = []
    for point in curve.growths:
        cut = bisect_right(curve.training.tokens, point.tokens)
        near = [abs(tokens - point.tokens) <= reach for tokens in curve.training.tokens]
        before = max(sum(near[:cut]), FEWEST_POINTS)
        after = max(sum(near[cut:]), FEWEST_POINTS)
        windows.append(
            GrowthWindow(curve, point, tuple(training[max(cut - before, 0) : cut]), tuple(training[cut : cut + after]))
        )
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
