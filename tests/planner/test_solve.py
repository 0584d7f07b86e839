"""The division of depth into stages, against trying every one."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steplm.errors import PlanInfeasible
from steplm.planner.solve import (
    StageCost,
    peak_cost,
    solve_dynamic_programming,
    solve_exhaustive,
    solve_integer_programme,
    solve_within,
)

ALL_SIZES = [(num_layers, num_stages) for num_layers in range(1, 17) for num_stages in range(1, min(4, num_layers) + 1)]
SOLVERS = [solve_dynamic_programming, solve_integer_programme, solve_exhaustive, solve_within]


def linear(new_layer: int, old_layer: int, first_stage: int, later_stage: int) -> StageCost:
    """The cost of the source's formula, with constants for what is not in the layers."""
    return lambda new, old: new_layer * new + old_layer * old + (first_stage if old == 0 else later_stage)


HALF_A_LAYER = linear(new_layer=16, old_layer=8, first_stage=5, later_stage=5)


def random_linear_cost(generator: random.Random) -> StageCost:
    constants = [generator.randint(0, 10**6) for _ in range(2)]
    return linear(generator.randint(1, 10**5), generator.randint(0, 10**5), *constants)


@pytest.mark.parametrize(("num_layers", "num_stages"), ALL_SIZES)
def test_both_solvers_choose_the_plan_of_exhaustive_search(num_layers: int, num_stages: int) -> None:
    generator = random.Random(num_layers * 10 + num_stages)
    for _ in range(3):
        cost = random_linear_cost(generator)
        expected = solve_exhaustive(cost, num_layers, num_stages)
        assert solve_dynamic_programming(cost, num_layers, num_stages) == expected
        assert solve_integer_programme(cost, num_layers, num_stages) == expected


@settings(deadline=None)
@given(seed=st.integers(0, 10**9), num_layers=st.integers(1, 14), data=st.data())
def test_dynamic_programming_is_exact_for_any_cost(seed: int, num_layers: int, data: st.DataObject) -> None:
    generator = random.Random(seed)
    # Few distinct values, so that ties are common.
    table = [[generator.randint(0, 6) for _ in range(num_layers + 1)] for _ in range(num_layers + 1)]
    num_stages = data.draw(st.integers(1, min(5, num_layers)))
    expected = solve_exhaustive(lambda new, old: table[new][old], num_layers, num_stages)
    assert solve_dynamic_programming(lambda new, old: table[new][old], num_layers, num_stages) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(-2, 2), st.data())
def test_within_a_limit_the_plan_is_that_of_exhaustive_search(
    num_layers: int, num_stages: int, spare: int, data: st.DataObject
) -> None:
    assume(num_stages <= num_layers)
    old_price = [0, *data.draw(st.lists(st.integers(0, 3), min_size=num_layers, max_size=num_layers))]
    new_price = data.draw(st.sampled_from([3, 4]))

    def cost(num_new: int, num_old: int) -> int:  # a new layer costs at least what an old one does
        return new_price * num_new + sum(old_price[: num_old + 1]) + 2 * (num_old > 0)

    expected = solve_exhaustive(cost, num_layers, num_stages)
    limit = peak_cost(cost, expected) + spare
    assert solve_within(cost, num_layers, num_stages) == expected
    assert solve_within(cost, num_layers, num_stages, limit) == (expected if spare >= 0 else None)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_within_a_limit_the_plan_is_exact_where_a_new_layer_never_costs_less(
    num_layers: int, num_stages: int, data: st.DataObject
) -> None:
    assume(num_stages <= num_layers)
    pieces = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 5), st.integers(0, 20)), min_size=1))

    def cost(num_new: int, num_old: int) -> int:  # the highest of several instants
        return 100 + max(new * num_new + old * num_old + rest for new, old, rest in pieces)

    expected = solve_exhaustive(cost, num_layers, num_stages)
    limit = peak_cost(cost, expected)
    assert solve_within(cost, num_layers, num_stages) == expected
    assert solve_within(cost, num_layers, num_stages, limit) == expected
    assert solve_within(cost, num_layers, num_stages, limit - 1) is None


@pytest.mark.parametrize(("num_layers", "num_stages"), ALL_SIZES)
def test_within_a_limit_the_plan_is_exact_where_old_layers_cost_more(num_layers: int, num_stages: int) -> None:
    cost = linear(new_layer=3, old_layer=5, first_stage=4, later_stage=1)
    expected = solve_exhaustive(cost, num_layers, num_stages)
    limit = peak_cost(cost, expected)
    assert solve_within(cost, num_layers, num_stages, limit) == expected
    assert solve_within(cost, num_layers, num_stages, limit - 1) is None


@pytest.mark.parametrize(("num_layers", "num_stages"), [(1, 1), (5, 2), (9, 3), (12, 4)])
def test_the_integer_programme_is_exact_for_any_cost(num_layers: int, num_stages: int) -> None:
    generator = random.Random(num_layers)
    table = [[generator.randint(0, 10**9) for _ in range(num_layers + 1)] for _ in range(num_layers + 1)]
    expected = solve_exhaustive(lambda new, old: table[new][old], num_layers, num_stages)
    assert solve_integer_programme(lambda new, old: table[new][old], num_layers, num_stages) == expected


@pytest.mark.parametrize("solve", SOLVERS)
def test_of_equal_peaks_the_plan_that_is_deep_early_is_chosen(solve) -> None:
    cost = linear(new_layer=0, old_layer=0, first_stage=1, later_stage=1)
    assert solve(cost, 7, 3) == (5, 1, 1)


@pytest.mark.parametrize("solve", SOLVERS)
def test_one_stage_takes_all_layers_and_as_many_stages_as_layers_take_one_each(solve) -> None:
    assert solve(HALF_A_LAYER, 6, 1) == (6,)
    assert solve(HALF_A_LAYER, 6, 6) == (1,) * 6


@pytest.mark.parametrize("num_stages", [0, 4])
@pytest.mark.parametrize("solve", SOLVERS)
def test_more_stages_than_layers_are_infeasible(solve, num_stages: int) -> None:
    with pytest.raises(PlanInfeasible, match=f"divides 3 layers into {num_stages} stages") as caught:
        solve(HALF_A_LAYER, 3, num_stages)
    assert (caught.value.num_layers, caught.value.num_stages) == (3, num_stages)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(24, 3), (32, 4)])
def test_solvers_agree_on_deep_models_in_bytes(num_layers: int, num_stages: int) -> None:
    cost = linear(16 * 12_601_344, 2 * 12_601_344 + 16 * 2_492_416, 16 * 65_537_024, 2 * 65_537_024)
    layers = solve_dynamic_programming(cost, num_layers, num_stages)
    assert layers == solve_integer_programme(cost, num_layers, num_stages)
    assert sum(layers) == num_layers


def test_no_exchange_of_one_layer_between_stages_lowers_the_peak() -> None:
    layers = solve_dynamic_programming(HALF_A_LAYER, 40, 5)
    for giver in range(5):
        for taker in range(5):
            moved = list(layers)
            moved[giver] -= 1
            moved[taker] += 1
            if min(moved) > 0:
                assert peak_cost(HALF_A_LAYER, tuple(moved)) >= peak_cost(HALF_A_LAYER, layers)


def test_costs_beyond_64_bits_are_divided_like_any() -> None:
    cost = linear(2**70, 2**69, 0, 0)
    assert solve_within(cost, 9, 3) == solve_dynamic_programming(cost, 9, 3)
