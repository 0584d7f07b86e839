"""Where new layers go: properties over all small sizes, and the picture of each position."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.errors import ConfigError, GrowthError
from steplm.planner.positions import POSITIONS, make_layer_map
from steplm.types import LayerMap

SIZES = list(product(range(1, 9), range(1, 20)))
GAP_POSITIONS = [name for name in POSITIONS if name != "top"]


def new_per_gap(layer_map: LayerMap, num_old: int) -> list[int]:
    counts = [0] * (num_old - 1)
    for origin in layer_map.origins:
        if origin.is_new:
            counts[origin.parents[0]] += 1
    return counts


@pytest.mark.parametrize("position", POSITIONS)
def test_every_old_layer_is_kept_once_and_in_order(position: str) -> None:
    for num_old, num_new in SIZES:
        layer_map = make_layer_map(num_old, num_new, position)
        assert layer_map.num_layers == num_old + num_new
        assert len(layer_map.new_layers) == num_new
        assert [layer_map.origins[i].parents for i in layer_map.kept_layers] == [(j,) for j in range(num_old)]
        assert all(layer_map.origins[i].fraction == 0.0 for i in layer_map.kept_layers)


@pytest.mark.parametrize("position", GAP_POSITIONS)
def test_new_layers_stand_between_their_parents(position: str) -> None:
    for num_old, num_new in SIZES:
        if num_old == 1:
            continue
        layer_map = make_layer_map(num_old, num_new, position)
        where = {layer_map.origins[i].parents[0]: i for i in layer_map.kept_layers}
        for i in layer_map.new_layers:
            lower, upper = layer_map.origins[i].parents
            assert upper == lower + 1
            assert where[lower] < i < where[upper]
            fraction = (i - where[lower]) / (where[upper] - where[lower])
            assert layer_map.origins[i].fraction == pytest.approx(fraction)


@pytest.mark.parametrize("position", GAP_POSITIONS)
def test_gaps_are_filled_as_evenly_as_possible(position: str) -> None:
    for num_old, num_new in SIZES:
        if num_old > 1:
            counts = new_per_gap(make_layer_map(num_old, num_new, position), num_old)
            assert max(counts) - min(counts) <= 1


def test_upper_is_the_mirror_of_lower() -> None:
    for num_old, num_new in SIZES:
        if num_old == 1:
            continue
        lower = make_layer_map(num_old, num_new, "lower").origins
        upper = make_layer_map(num_old, num_new, "upper").origins
        for low, high in zip(lower, reversed(upper), strict=True):
            assert low.is_new == high.is_new
            assert low.parents == tuple(num_old - 1 - parent for parent in reversed(high.parents))
            assert low.fraction == pytest.approx(1 - high.fraction if high.is_new else 0.0)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("upper", [0, 0, 0, 0, 1, 1, 1]),
        ("lower", [1, 1, 1, 0, 0, 0, 0]),
        ("intermediate", [0, 0, 1, 1, 1, 0, 0]),
        ("even", [0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_three_new_layers_in_seven_gaps(position: str, expected: list[int]) -> None:
    layer_map = make_layer_map(8, 3, position)
    assert new_per_gap(layer_map, 8) == expected
    assert {layer_map.origins[i].fraction for i in layer_map.new_layers} == {0.5}


def test_more_new_layers_than_gaps_put_the_remainder_where_the_position_prefers() -> None:
    assert new_per_gap(make_layer_map(4, 7, "upper"), 4) == [2, 2, 3]
    assert new_per_gap(make_layer_map(4, 7, "lower"), 4) == [3, 2, 2]
    assert new_per_gap(make_layer_map(4, 7, "intermediate"), 4) == [2, 3, 2]
    fractions = [o.fraction for o in make_layer_map(4, 7, "upper").origins if o.parents[0] == 2 and o.is_new]
    assert fractions == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_single_layer_grows_upwards_from_itself(position: str) -> None:
    layer_map = make_layer_map(1, 3, position)
    assert layer_map.new_layers == (1, 2, 3)
    assert [origin.parents for origin in layer_map.origins] == [(0,)] * 4


def test_top_repeats_the_block() -> None:
    layer_map = make_layer_map(3, 7, "top")
    assert [origin.parents[0] for origin in layer_map.origins] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert layer_map.new_layers == tuple(range(3, 10))


@given(num_old=st.integers(2, 30), num_new=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_random_is_the_same_for_the_same_seed(num_old: int, num_new: int, seed: int) -> None:
    assert make_layer_map(num_old, num_new, "random", seed) == make_layer_map(num_old, num_new, "random", seed)


def test_random_reaches_every_gap_and_depends_on_the_seed() -> None:
    chosen = {new_per_gap(make_layer_map(6, 1, "random", seed), 6).index(1) for seed in range(60)}
    assert chosen == {0, 1, 2, 3, 4}


def test_random_is_the_same_on_every_machine_and_version() -> None:
    assert make_layer_map(24, 5, "random", seed=7).new_layers == (7, 11, 18, 22, 25)


def test_a_misspelt_position_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"'uper'\. Did you mean 'upper'"):
        make_layer_map(4, 2, "uper")


@pytest.mark.parametrize(("num_old", "num_new"), [(0, 2), (2, 0), (2, -1)])
def test_growth_by_nothing_or_from_nothing_is_refused(num_old: int, num_new: int) -> None:
    with pytest.raises(GrowthError, match=f"cannot add {num_new} layers to {num_old}"):
        make_layer_map(num_old, num_new, "upper")
