"""Bytes of the storage formats, by hand and against those who store."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from steplm.config import MemoryConfig
from steplm.cost.formats import (
    CODE_BOOK_BYTES,
    FROZEN_FORMATS,
    STEP_CHUNK,
    int8_bytes,
    largest_bucket,
    nf4_bytes,
    state_bytes,
    step_bytes,
    unpack_bytes,
)
from steplm.optim.adamw import AdamW


@pytest.mark.parametrize(("num_parameters", "num_blocks"), [(1, 1), (256, 1), (257, 2), (512, 2), (1024 * 2736, 10944)])
def test_a_state_is_a_byte_an_element_and_four_a_block(num_parameters: int, num_blocks: int) -> None:
    assert state_bytes(num_parameters) == num_parameters + 4 * num_blocks


@pytest.mark.parametrize(
    ("rows", "columns", "int8", "nf4"),
    [
        (1, 1, 1 + 4, 1 + 2),
        (3, 5, 15 + 12, 8 + 2),  # the last byte of NF4 is half full
        (8, 8, 64 + 32, 32 + 2),
        (5, 13, 65 + 20, 33 + 4),  # blocks of NF4 run on over the rows
        (1024, 2736, 1024 * 2736 + 4096, 1024 * 2736 // 2 + 2 * 43776),
    ],
)
def test_a_packed_matrix_has_codes_and_scales(rows: int, columns: int, int8: int, nf4: int) -> None:
    assert (int8_bytes(rows, columns), nf4_bytes(rows, columns)) == (int8, nf4)


def test_in_a_large_matrix_nf4_is_the_promised_0_53_bytes_a_parameter_and_int8_one() -> None:
    size = 4096 * 4096
    assert nf4_bytes(4096, 4096) / size == 0.53125
    assert int8_bytes(4096, 4096) / size == pytest.approx(1, abs=1e-3)


def test_the_choices_of_the_configuration_are_the_formats_and_the_matrix_as_it_is() -> None:
    assert set(get_args(MemoryConfig.model_fields["frozen_weights"].annotation)) == {"full", *FROZEN_FORMATS}


def test_the_tables_of_8_bit_states_are_as_large_as_they_are_said_to_be() -> None:
    optimizer = AdamW({"weight": nn.Parameter(torch.zeros(2, 2))}, states="8bit")
    storages = {table.untyped_storage().data_ptr(): table.untyped_storage().nbytes() for table in optimizer.tables()}
    assert sum(storages.values()) == CODE_BOOK_BYTES


SIZES = st.one_of(
    st.integers(1, 100),
    st.integers(1, 2 * STEP_CHUNK),
    st.sampled_from([STEP_CHUNK - 1, STEP_CHUNK, STEP_CHUNK + 1, STEP_CHUNK // 2]),
)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, max_size=8))
@example(sizes=[STEP_CHUNK - 5, 6, 7])
@example(sizes=[3, STEP_CHUNK + 1])
@example(sizes=[])
def test_the_largest_bucket_is_the_optimizers(sizes: list[int]) -> None:
    parameters = {str(i): nn.Parameter(torch.empty(size, 1, device="meta")) for i, size in enumerate(sizes)}
    buckets = AdamW(parameters)._buckets if parameters else []
    found = max((sum(piece.stop - piece.start for piece in bucket) for bucket in buckets), default=0)
    assert largest_bucket(sizes) == found
    assert largest_bucket(sizes) <= min(STEP_CHUNK, sum(sizes))


@pytest.mark.parametrize(
    ("states", "masters", "of_one_piece", "of_small_pieces"),
    [
        ("fp32", "fp32", 4, 4),  # the gradient in fp32
        ("fp32", "8bit", 8, 8),  # the weight too; where one piece is split, its bits
        ("fp32", "none", 9, 8),  # the same; where one piece is rounded, random bits and a mask
        ("8bit", "fp32", 17, 12),  # both moments too; where one piece is rounded, indices, boundaries and comparison
        ("8bit", "8bit", 17, 16),
        ("8bit", "none", 17, 16),
    ],
)
def test_a_step_takes_the_bytes_that_the_optimizer_says(
    states: str, masters: str, of_one_piece: int, of_small_pieces: int
) -> None:
    assert step_bytes(1000, 1000, states=states, masters=masters) == of_one_piece * 1000
    assert step_bytes(1000, 1, states=states, masters=masters) == of_small_pieces * 1000
    for bucket in range(1, 40):
        for piece in range(1, bucket):
            here = step_bytes(bucket, piece, states=states, masters=masters)
            assert of_small_pieces * bucket <= here <= of_one_piece * bucket
            assert here <= step_bytes(bucket, piece + 1, states=states, masters=masters)


def test_a_plain_matrix_is_whole_already_and_a_packed_one_has_a_chunk_in_fp32_beside_it() -> None:
    assert unpack_bytes("full", 10**8, 2) == 0
    assert unpack_bytes("int8", 1000, 2) == 1000 * (2 + 4)
    assert unpack_bytes("nf4", 1000, 4) == 1000 * (4 + 6)
    assert unpack_bytes("nf4", 10**8, 2) == 2 * 10**8 + 6 * 2**22
