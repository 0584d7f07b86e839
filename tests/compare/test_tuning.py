"""The chosen learning rate has the lowest loss; divergence is worse than any."""

from __future__ import annotations

import math

import pytest

from steplm.compare.tuning import Choice, best, between, beyond, choose, reachable


@pytest.mark.parametrize(
    ("losses", "choice"),
    [
        ({1.0: 3.0, 2.0: 2.5, 4.0: 2.8}, Choice(2.0, at_edge=False)),
        ({1.0: 2.4, 2.0: 2.5, 4.0: 2.8}, Choice(1.0, at_edge=True)),
        ({4.0: 2.3, 2.0: 2.5, 1.0: 2.8}, Choice(4.0, at_edge=True)),
        ({1.0: 3.0, 2.0: 2.5, 4.0: None}, Choice(2.0, at_edge=False)),
        ({1.0: 9.0, 2.0: math.nan, 4.0: None}, Choice(1.0, at_edge=True)),
        ({4.0: 2.5, 2.0: 2.5, 1.0: 2.5}, Choice(1.0, at_edge=True)),
        ({1.0: None, 2.0: math.inf}, None),
    ],
)
def test_the_lowest_finite_loss_is_chosen(losses: dict[float, float | None], choice: Choice | None) -> None:
    assert choose(losses) == choice


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({1e-3: 2.4, 2e-3: 2.5, 4e-3: 2.8}, 5e-4),
        ({1e-3: 2.9, 2e-3: 2.5, 4e-3: 2.3}, 8e-3),
        ({1e-3: 2.9, 2e-3: 2.5, 6e-3: 2.3}, 1.8e-2),
        ({1e-3: 2.9, 2e-3: 2.5, 4e-3: 2.8}, None),
        ({1e-3: 2.9, 2e-3: 2.5, 4e-3: None}, None),
        ({1e-3: None, 2e-3: None}, None),
        ({1e-3: 2.9}, None),
    ],
)
def test_the_next_rate_lies_beyond_the_edge_that_is_best(losses: dict[float, float | None], rate: float | None) -> None:
    assert beyond(losses) == rate


def test_refinement_goes_halfway_to_the_neighbors_of_the_best() -> None:
    assert between({1e-3: 3.0, 4e-3: 2.0, 1.6e-2: 3.0}) == (2e-3, 8e-3)
    assert between({1e-3: 3.0, 2e-3: 2.0}) == (1.41e-3,)
    assert between({1e-3: 3.0, 4e-3: 2.0, 1.6e-2: None}) == (2e-3, 8e-3)
    assert between({1e-3: 3.0}) == ()
    assert between({1e-3: None, 2e-3: None}) == ()
    assert reachable((1e-3, 4e-3), 1, 1) == (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def test_every_extension_is_among_the_reachable_rates() -> None:
    assert reachable((1e-3, 2e-3, 4e-3), 0) == (1e-3, 2e-3, 4e-3)
    assert reachable((1e-3, 2e-3, 4e-3), 2) == (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    assert reachable((1e-3,), 2) == (1e-3,)
    assert reachable((), 2) == ()
    for falls in (True, False):
        losses: dict[float, float | None] = {1e-3: 2.0, 3e-3: 2.0}
        for step in range(4):
            losses = {rate: rate if falls else -rate for rate in losses}
            further = beyond(losses)
            assert further in reachable((1e-3, 3e-3), step + 1)
            losses[further] = 0.0


def test_means_over_seeds_decide_among_the_best_where_they_are_given() -> None:
    losses = {1e-3: 4.0, 2e-3: 3.5, 4e-3: 3.4, 8e-3: None}
    assert best(losses, 2) == (4e-3, 2e-3)
    assert choose(losses, {4e-3: 3.9, 2e-3: 3.6}) == Choice(2e-3, at_edge=False)
    assert choose(losses, {4e-3: float("inf"), 2e-3: float("inf")}) is None
    assert best({1e-3: None}, 2) == ()


def test_rates_stay_numbers_however_far_the_grid_is_extended() -> None:
    rates = reachable([1e-320, 1e300], extend=8, refine=3)
    assert all(0 < rate < math.inf for rate in rates)
