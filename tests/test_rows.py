"""A rank's rows are those that PyTorch gives it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from steplm.rows import WHOLE, Rows


@given(num_rows=st.integers(0, 40), count=st.integers(1, 9))
def test_parts_are_those_of_torch_chunk_and_the_missing_ones_are_empty(num_rows: int, count: int) -> None:
    tensor = torch.arange(num_rows)
    expected = list(torch.chunk(tensor, count)) if num_rows else []
    expected += [tensor[:0]] * (count - len(expected))
    for index, part in enumerate(expected):
        assert torch.equal(Rows(index, count).cut(tensor), part)


def test_a_part_keeps_nothing_but_itself_alive() -> None:
    tensor = torch.zeros(8, 3)
    assert Rows(1, 4).cut(tensor).untyped_storage().nbytes() == 2 * 3 * 4
    assert WHOLE.cut(tensor) is tensor
