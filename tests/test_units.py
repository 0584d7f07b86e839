from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.units import format_bytes, format_count, format_seconds, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        (" 1.5 MiB ", 3 * 2**19),
        ("512", 512),
        (512, 512),
        ("1e9", 10**9),
    ],
)
def test_bytes_are_read_as_people_write_them(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("10B", 10**10), ("2.5M", 2_500_000), ("600k", 600_000), ("1_000", 1000), (1e18, 10**18)],
)
def test_counts_are_read_as_people_write_them(text: str | float, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["ten", "10 potatoes", "", "-5", "0.5", True, "1.2.3M"])
def test_a_count_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|whole"):
        parse_count(text)


@given(st.integers(min_value=0, max_value=10**24))
def test_a_plain_number_is_itself(value: int) -> None:
    assert parse_count(str(value)) == parse_count(value) == value or value > 2**53
    assert parse_bytes(value) == value


def test_numbers_are_shown_with_their_unit() -> None:
    assert format_bytes(5 * 2**30) == "5.00 GiB"
    assert format_bytes(12) == "12 B"
    assert format_count(12_300_000) == "12.3M"
    assert [format_seconds(s) for s in (4.21, 65, 3725)] == ["4.2s", "1m05s", "1h02m"]
