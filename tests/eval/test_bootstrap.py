"""Intervals of paired differences against known answers and against resampling item by item."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steplm.errors import DataError
from steplm.eval.bootstrap import ItemScores, mean_difference, paired_difference


def scored(*scores: float, first: int = 0) -> ItemScores:
    return ItemScores(tuple(f"item {first + i}" for i in range(len(scores))), scores)


def accuracies(num_items: int, seed: int) -> ItemScores:
    return scored(*np.random.default_rng(seed).integers(0, 2, num_items).astype(float))


def test_the_interval_of_a_mean_difference_is_the_normal_one_where_items_are_many() -> None:
    ours, theirs = accuracies(2000, 1), accuracies(2000, 2)
    differences = np.array(ours.scores) - np.array(theirs.scores)
    half = 1.96 * differences.std() / math.sqrt(2000)
    gap = paired_difference(ours, theirs)
    assert gap.value == pytest.approx(differences.mean())
    assert gap.low == pytest.approx(gap.value - half, abs=0.05 * half)
    assert gap.high == pytest.approx(gap.value + half, abs=0.05 * half)


def test_the_interval_of_a_difference_of_perplexities_is_that_of_resampling_one_by_one() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=60), generator.normal(0.3, size=60)
    plain = []
    for _ in range(10_000):
        items = generator.choice(60, size=60)
        plain.append(math.exp(-ours[items].mean()) - math.exp(-theirs[items].mean()))
    gap = paired_difference(scored(*ours), scored(*theirs), statistic=lambda means: np.exp(-means))
    assert gap.value == pytest.approx(math.exp(-ours.mean()) - math.exp(-theirs.mean()))
    expected = np.percentile(plain, [2.5, 97.5])
    width = expected[1] - expected[0]
    assert [gap.low, gap.high] == pytest.approx(expected, abs=0.05 * width)


def test_identical_models_differ_by_exactly_zero() -> None:
    scores = np.random.default_rng(3).normal(-40, 7, size=333)
    gap = paired_difference(scored(*scores), scored(*scores), statistic=lambda means: np.exp(-means))
    assert (gap.value, gap.low, gap.high) == (0.0, 0.0, 0.0)
    assert not gap.leaves_out_zero
    assert not gap.replicates.any()


def test_what_all_items_share_is_certain() -> None:
    gap = paired_difference(scored(*[1.0] * 9), scored(*[0.25] * 9))
    assert (gap.value, gap.low, gap.high) == (0.75, 0.75, 0.75)
    assert gap.leaves_out_zero


def test_pairing_makes_the_interval_narrow_where_models_agree() -> None:
    base = np.random.default_rng(4).integers(0, 2, 400).astype(float)
    shifted = base.copy()
    shifted[:8] = 1 - shifted[:8]
    gap = paired_difference(scored(*shifted), scored(*base))
    alone = 1.96 * base.std() * math.sqrt(2 / 400)
    assert gap.high - gap.low < 0.5 * alone


def test_the_same_seed_gives_the_same_interval_and_the_opposite_order_its_mirror() -> None:
    ours, theirs = accuracies(50, 5), accuracies(50, 6)
    gap, again = paired_difference(ours, theirs, seed="piqa"), paired_difference(ours, theirs, seed="piqa")
    assert (gap.low, gap.high) == (again.low, again.high)
    other = paired_difference(ours, theirs, seed="arc_easy")
    assert not np.array_equal(other.replicates, gap.replicates)
    assert paired_difference(theirs, ours, seed="piqa").value == -gap.value


def test_the_mean_over_sets_is_narrower_than_each_as_they_are_resampled_apart() -> None:
    gaps = [paired_difference(accuracies(300, s), accuracies(300, s + 100), seed=str(s)) for s in range(9)]
    average = mean_difference(gaps)
    assert average.value == pytest.approx(np.mean([gap.value for gap in gaps]))
    width = np.mean([gap.high - gap.low for gap in gaps])
    assert average.high - average.low == pytest.approx(width / 3, rel=0.1)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (scored(1.0, 0.0), "3 items against 2"),
        (scored(1.0, 0.0, 1.0, first=1), "3 of 3 items differ"),
        (ItemScores(("item 0", "item 2", "item 1"), (1.0, 0.0, 1.0)), "2 of 3 items differ"),
    ],
)
def test_other_items_are_refused(theirs: ItemScores, message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired_difference(scored(1.0, 0.0, 1.0), theirs)
    with pytest.raises(DataError, match="0 items against 0"):
        paired_difference(scored(), scored())
