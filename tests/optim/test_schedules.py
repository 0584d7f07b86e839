import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.errors import ConfigError
from steplm.optim.schedules import SCHEDULES, learning_rate


def rates(kind, num_steps, warmup_steps, decay_steps=0, min_ratio=0.1, peak=1.0, extra=0):
    return [
        learning_rate(
            step,
            num_steps=num_steps,
            warmup_steps=warmup_steps,
            peak=peak,
            min_ratio=min_ratio,
            kind=kind,
            decay_steps=decay_steps,
        )
        for step in range(num_steps + extra)
    ]


def test_cosine_by_hand():
    assert rates("cosine", 7, 2, min_ratio=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 0.6 + 0.4 * 2**-0.5, 0.6, 0.6 - 0.4 * 2**-0.5, 0.2]
    )


def test_warmup_stable_decay_by_hand():
    assert rates("warmup_stable_decay", 10, 2, decay_steps=4, min_ratio=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_constant_with_warmup_by_hand():
    assert rates("constant_with_warmup", 6, 4, peak=8.0) == pytest.approx([2, 4, 6, 8, 8, 8])


@given(
    kind=st.sampled_from(sorted(SCHEDULES)),
    num_steps=st.integers(1, 60),
    warmup_share=st.floats(0, 0.99),
    decay_share=st.floats(0, 1),
    min_ratio=st.floats(0, 1),
    peak=st.floats(1e-6, 1.0),
)
def test_every_schedule_rises_then_falls_between_its_bounds(
    kind, num_steps, warmup_share, decay_share, min_ratio, peak
):
    warmup_steps, decay_steps = round(warmup_share * num_steps), round(decay_share * num_steps)
    values = rates(kind, num_steps, warmup_steps, decay_steps, min_ratio, peak, extra=5)
    assert all(0 < value <= peak * (1 + 1e-12) or value == pytest.approx(min_ratio * peak) for value in values)
    warm, rest = values[:warmup_steps], values[warmup_steps:]
    assert warm == sorted(warm)
    assert all(a >= b - 1e-12 * peak for a, b in itertools.pairwise(rest))
    assert min(rest) >= min_ratio * peak - 1e-12
    assert len(set(values[num_steps - 1 :])) <= 1 or warmup_steps == num_steps, "stays there past its end"
    if warmup_steps:
        assert values[warmup_steps - 1] == pytest.approx(peak)
    ends = kind == "cosine" or (kind == "warmup_stable_decay" and decay_steps > 0)
    if ends and num_steps - warmup_steps > 1:
        assert values[num_steps - 1] == pytest.approx(min_ratio * peak, abs=1e-12)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 50))
def test_the_rate_is_proportional_to_the_peak(kind, num_steps):
    ones = rates(kind, num_steps, 1, decay_steps=num_steps // 2)
    assert rates(kind, num_steps, 1, num_steps // 2, peak=3e-4) == pytest.approx([3e-4 * value for value in ones])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="Known: cosine"):
        rates("linear", 3, 0)
