from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.types import TrainState, from_json
from steplm.units import format_bytes, format_count, format_seconds, parse_bytes, parse_count, reason, shortened


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        (" 1.5 MiB ", 3 * 2**19),
        ("512", 512),
        (512, 512),
        ("1e9", 10**9),
        ("4.1GB", 4_100_000_000),
        ("23.6GiB", 25_340_307_046),  # rounded down
    ],
)
def test_bytes_are_read_as_people_write_them(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("10B", 10**10), ("2.5M", 2_500_000), ("600k", 600_000), ("16.1k", 16_100), ("1_000", 1000), (1e18, 10**18)],
)
def test_counts_are_read_as_people_write_them(text: str | float, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["ten", "10 potatoes", "", "-5", "0.5", 2.5, True, "1.2.3M", "1.0001k"])
def test_a_count_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|whole"):
        parse_count(text)


@given(st.integers(min_value=0, max_value=10**6), st.sampled_from(["k", "M", "B"]))
def test_a_count_with_decimals_is_exact(thousandths: int, unit: str) -> None:
    size = {"k": 10**3, "M": 10**6, "B": 10**9}[unit]
    assert parse_count(f"{thousandths // 1000}.{thousandths % 1000:03d}{unit}") == thousandths * size // 1000


@given(st.integers(min_value=0, max_value=2**50))
def test_bytes_as_they_are_shown_can_be_read_again(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.005)


@given(st.integers(min_value=0, max_value=10**24))
def test_a_plain_number_is_itself(value: int) -> None:
    assert parse_count(str(value)) == parse_count(value) == value or value > 2**53
    assert parse_bytes(value) == value


def test_numbers_are_shown_with_their_unit() -> None:
    assert format_bytes(5 * 2**30) == "5.00 GiB"
    assert format_bytes(12) == "12 B"
    assert format_count(12_300_000) == "12.3M"
    assert [format_count(n) for n in (999, 999_499, 999_999, 10**6)] == ["999", "999k", "1M", "1M"]
    assert [format_seconds(s) for s in (4.21, 65, 3725)] == ["4.2s", "1m05s", "1h02m"]
    days = [format_seconds(s) for s in (345_599, 345_600, 93_784_000)]
    assert days == ["95h59m", "4d 00h", "1085d 11h"]


@pytest.mark.parametrize("value", ["1e999", "1e999999999", "1e-999999999", float("inf"), float("nan"), [1], None, {}])
def test_what_is_no_whole_number_is_a_value_error(value: object) -> None:
    for parse in (parse_count, parse_bytes):
        with pytest.raises(ValueError, match=r"whole number|a number such as"):
            parse(value)  # type: ignore[arg-type]


def test_a_long_value_is_shown_by_its_two_ends() -> None:
    assert shortened("text") == "'text'"
    shown = shortened("a" + "x" * 5000 + "b")
    assert len(shown) == 81
    assert (shown[:3], shown[-2:]) == ("'ax", "b'")


def test_the_reason_of_an_error_is_one_line() -> None:
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(KeyError()) == "KeyError"
    assert reason(ValueError("half \ud83d")) == "half \\ud83d"
    with pytest.raises(ValueError, match="TrainState") as caught:
        from_json(TrainState, {"stage_index": "x" * 999})
    assert reason(caught.value).startswith("stage_index: Input should be a valid integer")
    assert reason(caught.value).endswith("(and 4 more)")
    assert len(reason(caught.value)) < 250
