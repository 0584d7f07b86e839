"""Paired bootstrap: the difference between two models on the same items, with a confidence interval.

N items, R resamples. Both models are scored on the same resamples, so the difficulty of the items cancels out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steplm.errors import DataError

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 4_000_000  # item draws per chunk of resamples: 32 MB of scores
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ItemScores:
    """One score per item, in dataset order; ``ids`` identify the items."""

    ids: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """A difference and the bounds of its 95% interval; ``replicates``, (R,), are the resampled differences."""

    value: float
    low: float
    high: float
    replicates: Array

    @property
    def leaves_out_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def identity(means: Array) -> Array:
    """The statistic for accuracies: the mean itself."""
    return means


def paired_difference(
    ours: ItemScores,
    theirs: ItemScores,
    *,
    statistic: Callable[[Array], Array] = identity,
    seed: str = "",
    num_resamples: int = NUM_RESAMPLES,
) -> Difference:
    """``statistic(mean of ours) - statistic(mean of theirs)``, with its percentile interval.

    Args:
        statistic: elementwise function of the mean scores; for a perplexity ``exp(-mean)``.
        seed: the same string gives the same interval.

    Raises:
        DataError: the two models were not scored on the same items, or there are no items.
    """
    _require_same_items(ours, theirs)
    our_scores, their_scores = np.array(ours.scores), np.array(theirs.scores)
    num_items = len(our_scores)
    generator = np.random.default_rng(zlib.crc32(seed.encode()))
    replicates = np.empty(num_resamples)
    rows = max(1, DRAWN_AT_ONCE // num_items)
    for start in range(0, num_resamples, rows):
        end = min(start + rows, num_resamples)
        items = generator.integers(num_items, size=(end - start, num_items), dtype=np.int32)
        # Both means use the same operations, so that equal models differ by exactly 0.
        our_means, their_means = our_scores[items].mean(axis=1), their_scores[items].mean(axis=1)
        replicates[start:end] = statistic(our_means) - statistic(their_means)
    value = float(statistic(our_scores.mean(keepdims=True))[0] - statistic(their_scores.mean(keepdims=True))[0])
    return with_interval(value, replicates)


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """Mean of the differences on several datasets, each resampled independently."""
    value = float(np.mean([difference.value for difference in differences]))
    return with_interval(value, np.mean([difference.replicates for difference in differences], axis=0))


def with_interval(value: float, replicates: Array) -> Difference:
    """A difference whose interval is the 2.5th to 97.5th percentile of its replicates."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return Difference(value, float(low), float(high), replicates)


def _require_same_items(ours: ItemScores, theirs: ItemScores) -> None:
    if ours.ids == theirs.ids and ours.ids:
        return
    if len(ours.ids) != len(theirs.ids) or not ours.ids:
        what = f"{len(ours.ids)} items against {len(theirs.ids)}"
    else:
        what = f"{sum(a != b for a, b in zip(ours.ids, theirs.ids, strict=True))} of {len(ours.ids)} items differ"
    raise DataError(
        f"a paired difference needs the same items in the same order: {what}. "
        "Evaluate both models with the same sets, limit and few-shot examples.",
        num_ours=len(ours.ids),
        num_theirs=len(theirs.ids),
    )
