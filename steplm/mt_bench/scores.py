"""Means and win shares with their intervals and numbers of judgments.

The bootstrap resamples questions, each with both of its turns, because the turns are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from steplm.mt_bench.data import Bench, QuestionId
from steplm.mt_bench.judge import Judged

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
ALL = "all"
TURNS = (None, 1, 2)  # turns that a mean covers: both, the first, the second
_WORTH = {"model_1": 1.0, "tie": 0.5, "model_2": 0.0}

Cell = tuple[QuestionId, int]  # a question and a turn
Where = tuple[str, int | None]  # a category or ``ALL``, and a turn or None for both


@dataclass(frozen=True)
class Score:
    """A mean over judgments, ``None`` if nothing was judged; an interval needs at least two questions.

    Attributes:
        kind: ``score`` of one model, 1 to 10; ``score_difference`` of two, over what both were judged on, above 0 if
            the first is better; ``win_share`` of the first of two, where a tie counts as half a win.
        judged: number of judgments in the mean.
        expected: number of judgments if none were missing.
        unparsable: judgments with an unparsable reply; any others missing were not requested or got no reply.
        counts: for a win share: ``wins``, ``ties``, ``losses``, and ``orders_disagree`` among the ties.
    """

    kind: str
    models: tuple[str, ...]
    category: str
    turn: int | None
    mean: float | None
    low: float | None
    high: float | None
    judged: int
    expected: int
    unparsable: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.judged == self.expected

    @property
    def row(self) -> dict[str, Any]:
        """A flat row for CSV and JSON."""
        return {
            "kind": self.kind,
            **dict(zip(("model", "other"), self.models, strict=False)),
            "category": self.category,
            "turn": self.turn or "both",
            "mean": self.mean,
            "ci95_low": self.low,
            "ci95_high": self.high,
            "judged": self.judged,
            "expected": self.expected,
            "unparsable": self.unparsable,
            **self.counts,
        }


@dataclass(frozen=True)
class Scores:
    scores: tuple[Score, ...]

    def of(self, kind: str) -> dict[tuple[str, ...], dict[Where, Score]]:
        """Scores of one kind by model or pair of models, each by category and turn."""
        found: dict[tuple[str, ...], dict[Where, Score]] = {}
        for score in self.scores:
            if score.kind == kind:
                found.setdefault(score.models, {})[score.category, score.turn] = score
        return found


def all_scores(bench: Bench, models: Sequence[str], modes: Sequence[str], judgments: Iterable[Judged]) -> Scores:
    """Every mean of a run.

    Args:
        modes: ``single``, ``pairwise`` or both.
        judgments: the judgments made; all others count as missing.
    """
    found: dict[tuple[str, ...], dict[Cell, Judged]] = {}
    for each in judgments:
        cell = (each.judgment.question.question_id, each.judgment.turn)
        found.setdefault(each.judgment.models, {})[cell] = each
    scores: list[Score] = []
    if "single" in modes:
        of_model = {name: {c: j.score for c, j in found.get((name,), {}).items()} for name in models}
        for name in models:
            scores += _scores(bench, "score", (name,), of_model[name], found)
        for one, two in combinations(models, 2):
            gaps = {
                c: a - b for c, a in of_model[one].items() if a is not None and (b := of_model[two].get(c)) is not None
            }
            scores += _scores(bench, "score_difference", (one, two), gaps, {})
    if "pairwise" in modes:
        for pair in combinations(models, 2):
            worth = {c: None if j.winner is None else _WORTH[j.winner] for c, j in found.get(pair, {}).items()}
            scores += _scores(bench, "win_share", pair, worth, found)
    return Scores(tuple(scores))


def _scores(
    bench: Bench,
    kind: str,
    models: tuple[str, ...],
    values: Mapping[Cell, float | None],
    found: Mapping[tuple[str, ...], Mapping[Cell, Judged]],
) -> Iterable[Score]:
    judged = found.get(models, {})
    for category in (*bench.categories, ALL):
        for turn in TURNS:
            cells = [
                (question.question_id, number)
                for question in bench.questions
                if category in (ALL, question.category)
                for number in range(1, len(question.turns) + 1)
                if turn in (None, number)
            ]
            known = {cell: value for cell in cells if (value := values.get(cell)) is not None}
            unparsable = sum(cell in judged and any(o.unparsable for o in judged[cell].outcomes) for cell in cells)
            counts = _counts([judged[cell] for cell in known]) if kind == "win_share" else {}
            yield Score(kind, models, category, turn, *interval(known), len(known), len(cells), unparsable, counts)


def _counts(compared: Sequence[Judged]) -> dict[str, int]:
    winners = [each.winner for each in compared]
    counts = {name: winners.count(who) for name, who in (("wins", "model_1"), ("ties", "tie"), ("losses", "model_2"))}
    return {**counts, "orders_disagree": sum(each.winners[0] != each.winners[1] for each in compared)}


def interval(values: Mapping[Cell, float]) -> tuple[float | None, float | None, float | None]:
    """Mean of values by question and turn, with the 95% percentile interval of a bootstrap over questions.

    There is no interval for fewer than two questions. The same values give the same interval.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    by_question: dict[QuestionId, list[float]] = {}
    for (question_id, _), value in values.items():
        by_question.setdefault(question_id, []).append(value)
    if not by_question:
        return None, None, None
    sums, counts = (np.array([measure(turns) for turns in by_question.values()]) for measure in (sum, len))
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, None, None
    drawn = np.random.default_rng(0).integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return mean, float(low), float(high)
