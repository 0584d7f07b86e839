"""Token budgets: whole steps that add up."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.config import PlanConfig
from steplm.errors import ConfigError
from steplm.planner.tokens import StageTokens, stage_tokens

LAYERS = (4, 3, 1)


def tokens_of(layers: tuple[int, ...] = LAYERS, *, step_tokens: int = 10, **budget: object) -> list[StageTokens]:
    config = PlanConfig(num_stages=len(layers), **budget)  # type: ignore[arg-type]
    flops = [1000 * (stage + 1) for stage in range(len(layers))]
    return stage_tokens(config, layers, step_tokens=step_tokens, num_parameters=6_000, flops_per_token=flops)


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple),
    total_tokens=st.integers(1, 10**7),
    step_tokens=st.integers(1, 5000),
    grow_at=st.floats(0.05, 1.0),
    shares=st.sampled_from(["layers", "equal"]),
)
def test_trained_tokens_are_whole_steps_that_add_up_to_the_total(
    layers: tuple[int, ...], total_tokens: int, step_tokens: int, grow_at: float, shares: str
) -> None:
    budget = {"total_tokens": total_tokens, "grow_at": grow_at, "token_shares": shares}
    if round(total_tokens / step_tokens) < len(layers):
        with pytest.raises(ConfigError, match="less than one optimizer step"):
            tokens_of(layers, step_tokens=step_tokens, **budget)
        return
    tokens = tokens_of(layers, step_tokens=step_tokens, **budget)
    assert all(t.trained > 0 and t.trained % step_tokens == 0 and t.scheduled % step_tokens == 0 for t in tokens)
    assert abs(sum(t.trained for t in tokens) - total_tokens) <= step_tokens / 2
    assert all(t.trained <= t.scheduled for t in tokens)
    for t in tokens[:-1]:
        assert t.trained == pytest.approx(grow_at * t.scheduled, abs=step_tokens / 2 + 1e-6)
    assert tokens[-1].scheduled == tokens[-1].trained


def test_shares_by_layers_follow_the_depth_of_each_stage() -> None:
    trained = [t.trained for t in tokens_of(total_tokens=190_000)]
    assert trained == [10_000 * depth for depth in accumulate(LAYERS)]


def test_shares_can_be_equal_or_given() -> None:
    assert [t.trained for t in tokens_of(total_tokens=3000, token_shares="equal")] == [1000] * 3
    assert [t.trained for t in tokens_of(total_tokens=4000, token_shares=[1, 1, 2])] == [1000, 1000, 2000]


def test_a_stage_of_less_than_a_step_is_refused_however_its_tokens_are_given() -> None:
    with pytest.raises(ConfigError, match=r"a stage of 4 tokens is less than one optimizer step \(10 tokens\)"):
        tokens_of((4, 3), tokens_per_stage=[4, 20])
    assert [t.trained for t in tokens_of((4, 3), tokens_per_stage=[6, 24])] == [10, 20]


def test_a_large_share_leaves_a_step_for_every_later_stage() -> None:
    assert [t.trained for t in tokens_of(total_tokens=40, token_shares=[100, 1, 1])] == [20, 10, 10]


def test_a_stage_stops_when_the_given_share_of_its_schedule_is_done() -> None:
    tokens = tokens_of(total_tokens=9000, token_shares="equal", grow_at=0.75)
    assert [t.scheduled for t in tokens] == [4000, 4000, 3000]


def test_tokens_per_stage_are_taken_as_they_are_up_to_whole_steps() -> None:
    assert [t.trained for t in tokens_of(tokens_per_stage=[104, 8, 57])] == [100, 10, 60]


def test_the_default_is_twenty_tokens_per_parameter() -> None:
    assert sum(t.trained for t in tokens_of()) == 20 * 6_000
    assert sum(t.trained for t in tokens_of(tokens_per_parameter=1.5)) == 9_000


def test_a_budget_in_flops_is_spent() -> None:
    tokens = tokens_of(total_flops=10**10, token_shares="equal")
    spent = sum(1000 * (stage + 1) * t.trained for stage, t in enumerate(tokens))
    assert spent == pytest.approx(10**10, rel=1e-4)
    assert tokens[0].trained == pytest.approx(tokens[2].trained, abs=10)
