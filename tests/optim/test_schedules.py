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


GOLDEN = {  # 9 steps, 3 of warm-up, 4 of decay: rates as they were before schedules had parts
    "constant_with_warmup": [9.999999999999999e-05, 0.00019999999999999998] + [0.0003] * 9,
    "cosine": [
        9.999999999999999e-05,
        0.00019999999999999998,
        0.0003,
        0.0003,
        0.00027421729424061787,
        0.00020671729424061788,
        0.00012328270575938212,
        5.578270575938211e-05,
        *[2.9999999999999997e-05] * 3,
    ],
    "warmup_stable_decay": [
        9.999999999999999e-05,
        0.00019999999999999998,
        0.0003,
        0.0003,
        0.0003,
        0.00023249999999999999,
        0.000165,
        9.749999999999998e-05,
        *[2.999999999999999e-05] * 3,
    ],
}


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_the_first_part_has_the_rates_of_a_whole_schedule_to_the_last_bit(kind):
    assert rates(kind, 9, 3, decay_steps=4, peak=3e-4, extra=2) == GOLDEN[kind]


def jagged(kind, num_steps, starts, base_warmup, warmup, decay_steps=0, min_ratio=0.1):
    """The rates of all parts, one after the other."""
    return [
        learning_rate(
            step,
            num_steps=num_steps,
            warmup_steps=warmup if start else base_warmup,
            base_warmup_steps=base_warmup,
            peak=1.0,
            min_ratio=min_ratio,
            kind=kind,
            decay_steps=decay_steps,
            start=start,
        )
        for start, stop in itertools.pairwise([*starts, num_steps])
        for step in range(stop - start)
    ]


def test_a_jagged_cosine_by_hand():
    half = 0.5**0.5 / 2
    assert jagged("cosine", 7, (0, 4), base_warmup=2, warmup=2, min_ratio=0.0) == pytest.approx(
        [0.5, 1.0, 1.0, 0.5 + half, 0.5 * 0.5, 0.5 - half, 0.0]
    )


def test_a_later_part_without_warmup_is_the_rest_of_the_schedule_to_the_last_bit():
    for kind in SCHEDULES:
        whole = rates(kind, 20, 3, decay_steps=8)
        assert jagged(kind, 20, (0, 7, 13), base_warmup=3, warmup=0, decay_steps=8) == whole


def test_a_part_that_begins_within_the_first_warmup_rises_to_a_rising_curve():
    rising = jagged("constant_with_warmup", 8, (0, 2), base_warmup=6, warmup=2)
    assert rising == pytest.approx([1 / 6, 2 / 6, 3 / 6 / 2, 4 / 6, 5 / 6, 1, 1, 1])


def test_the_first_warmup_is_as_long_as_the_parts_where_nothing_else_is_said():
    def rate(**options):
        return learning_rate(
            1, num_steps=20, warmup_steps=4, peak=1.0, min_ratio=0.1, kind="cosine", start=9, **options
        )

    assert rate() == rate(base_warmup_steps=4) != rate(base_warmup_steps=8)


@given(
    kind=st.sampled_from(sorted(SCHEDULES)),
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=5),
    base_warmup=st.integers(0, 12),
    warmup=st.integers(0, 12),
    min_ratio=st.floats(0, 1),
)
def test_parts_never_leave_the_curve_upwards_and_meet_it_after_their_warmup(
    kind, lengths, base_warmup, warmup, min_ratio
):
    num_steps, starts = sum(lengths), [0, *itertools.accumulate(lengths)][:-1]
    decay_steps = num_steps // 2
    curve = rates(kind, num_steps, base_warmup, decay_steps, min_ratio)
    found = jagged(kind, num_steps, starts, base_warmup, warmup, decay_steps, min_ratio)
    assert len(found) == num_steps
    for start, length in zip(starts, lengths, strict=True):
        for step in range(length):
            share = min(1.0, (step + 1) / warmup) if start and warmup else 1.0
            assert found[start + step] == curve[start + step] * share
