"""Means and shares with their intervals, and of how many judgments they are.

The unit that is drawn again is the question, with both its turns: they are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from steplm.mt_bench.data import Bench, QuestionId
from steplm.mt_bench.judge import Grading, Judged

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
ALL = "all"
WHERE = (None, 1, 2)  # turns of a mean: both together, the first, the second
_WORTH = {"model_1": 1.0, "tie": 0.5, "model_2": 0.0}


@dataclass(frozen=True)
class Mean:
    """A mean over judgments; ``None`` where nothing was judged, an interval only from two questions on."""

    mean: float | None
    low: float | None
    high: float | None
    judged: int  # judgments that the mean is of
    expected: int  # that there would be if none were missing
    unparsable: int = 0  # replies that say nothing; the rest of those missing were not asked or not answered

    @property
    def complete(self) -> bool:
        return self.judged == self.expected


@dataclass(frozen=True)
class SingleScore:
    """Of one model; ``category`` may be ``ALL``, ``turn`` ``None`` for both."""

    model: str
    category: str
    turn: int | None
    score: Mean  # 1 to 10


@dataclass(frozen=True)
class ScoreDifference:
    """Of the single scores of two models, over what both were judged on."""

    model_1: str
    model_2: str
    category: str
    turn: int | None
    difference: Mean  # model_1 less model_2


@dataclass(frozen=True)
class PairScore:
    """How often one of two models won against the other."""

    model_1: str
    model_2: str
    category: str
    turn: int | None
    wins: int  # of model_1, in both orders
    ties: int  # or the orders disagree
    losses: int
    disagreements: int  # between the two orders, among the ties
    win_share: Mean  # a tie counts as half a win


@dataclass(frozen=True)
class Scores:
    singles: tuple[SingleScore, ...]
    differences: tuple[ScoreDifference, ...]
    pairs: tuple[PairScore, ...]

    def single(self, model: str, category: str = ALL, turn: int | None = None) -> SingleScore:
        return next(s for s in self.singles if (s.model, s.category, s.turn) == (model, category, turn))


Cell = tuple[QuestionId, int]  # a question's turn


def all_scores(bench: Bench, models: Sequence[str], modes: Sequence[str], judgments: Iterable[Judged]) -> Scores:
    """Every mean of a run.

    Args:
        modes: of ``single`` and ``pairwise``.
        judgments: what was judged; whatever is not among them counts as missing.
    """
    singles: dict[str, dict[Cell, Judged]] = {model: {} for model in models}
    pairs: dict[tuple[str, str], dict[Cell, Judged]] = {pair: {} for pair in combinations(models, 2)}
    for each in judgments:
        cell = (each.judgment.question.question_id, each.judgment.turn)
        if isinstance(each.judgment, Grading):
            singles[each.judgment.model][cell] = each
        else:
            pairs[each.judgment.model_1, each.judgment.model_2][cell] = each
    where = [(category, turn) for category in (*bench.categories, ALL) for turn in WHERE]
    with_pairs = list(pairs) if "pairwise" in modes else []
    in_single = list(models) if "single" in modes else []
    return Scores(
        tuple(
            SingleScore(model, category, turn, _mean(_cells(bench, category, turn), singles[model], _score))
            for model in in_single
            for category, turn in where
        ),
        tuple(
            ScoreDifference(
                one, two, category, turn, _difference(_cells(bench, category, turn), singles[one], singles[two])
            )
            for one, two in combinations(in_single, 2)
            for category, turn in where
        ),
        tuple(
            _pair(one, two, category, turn, _cells(bench, category, turn), pairs[one, two])
            for one, two in with_pairs
            for category, turn in where
        ),
    )


def _cells(bench: Bench, category: str, turn: int | None) -> list[Cell]:
    return [
        (question.question_id, number)
        for question in bench.questions
        if category in (ALL, question.category)
        for number in range(1, len(question.turns) + 1)
        if turn in (None, number)
    ]


def _score(each: Judged) -> float | None:
    return each.score


def _win_worth(each: Judged) -> float | None:
    return None if each.winner is None else _WORTH[each.winner]


def _mean(cells: Sequence[Cell], found: dict[Cell, Judged], value: Callable[[Judged], float | None]) -> Mean:
    values = {cell: v for cell in cells if cell in found and (v := value(found[cell])) is not None}
    unparsable = sum(cell in found and any(o.unparsable for o in found[cell].outcomes) for cell in cells)
    mean, low, high = interval(values)
    return Mean(mean, low, high, len(values), len(cells), unparsable)


def _difference(cells: Sequence[Cell], one: dict[Cell, Judged], two: dict[Cell, Judged]) -> Mean:
    values = {
        cell: a - b
        for cell in cells
        if cell in one and cell in two and (a := one[cell].score) is not None and (b := two[cell].score) is not None
    }
    mean, low, high = interval(values)
    return Mean(mean, low, high, len(values), len(cells))


def _pair(
    one: str, two: str, category: str, turn: int | None, cells: Sequence[Cell], found: dict[Cell, Judged]
) -> PairScore:
    won = [found[cell] for cell in cells if cell in found and found[cell].winner is not None]
    winners = [each.winner for each in won]
    return PairScore(
        one,
        two,
        category,
        turn,
        winners.count("model_1"),
        winners.count("tie"),
        winners.count("model_2"),
        sum(each.winners[0] != each.winners[1] for each in won),
        _mean(cells, found, _win_worth),
    )


def interval(values: dict[Cell, float]) -> tuple[float | None, float | None, float | None]:
    """Mean of values by question and turn, with the 95% percentile interval of a bootstrap over questions.

    No interval from fewer than two questions. The same values give the same interval.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    if not values:
        return None, None, None
    by_question: dict[QuestionId, list[float]] = {}
    for (question_id, _), value in values.items():
        by_question.setdefault(question_id, []).append(value)
    sums = np.array([sum(turns) for turns in by_question.values()])
    counts = np.array([len(turns) for turns in by_question.values()])
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, None, None
    drawn = np.random.default_rng(0).integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return mean, float(low), float(high)
