import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steplm.cost.formats import STATE_BLOCK, state_bytes
from steplm.optim.quantized import CodeBook, dynamic_tree, round_stochastically_

SIGNED, UNSIGNED = CodeBook(signed=True, device="cpu"), CodeBook(signed=False, device="cpu")


def quant_utils():
    pytest.importorskip("torchao", reason="torchao is not installed")
    return pytest.importorskip("torchao.optim.quant_utils")


@pytest.mark.parametrize("signed", [True, False])
def test_the_data_type_by_hand(signed):
    values = dynamic_tree(signed)
    assert len(set(values)) == 256
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert 0.0 in values
    assert min(value for value in values if value > 0) == pytest.approx(5.5e-7 if signed else 3.25e-7)
    assert sum(0.1 < value < 1 for value in values) == (64 if signed else 128)
    assert sum(value < 0 for value in values) == (127 if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_the_data_type_is_that_of_torchao(signed):
    theirs = quant_utils().create_dynamic_map(signed)
    torch.testing.assert_close(torch.tensor(dynamic_tree(signed)), torch.tensor(theirs), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_values_are_those_of_torchao(signed):
    reference, book = quant_utils(), SIGNED if signed else UNSIGNED
    torch.manual_seed(0)
    values = torch.randn(64 * STATE_BLOCK) * torch.logspace(-3, 3, 64).repeat_interleave(STATE_BLOCK)
    values = values if signed else values.square() + 1e-6 * values.square().max()  # theirs gives up what is near 0
    scaled, scales = reference.scale_tensor(values, STATE_BLOCK)
    expected = reference.quantize_8bit_with_qmap(scaled, book.values)
    codes, own_scales = book.quantize(values)
    assert torch.equal(own_scales, scales)
    differing = codes != expected
    assert differing.float().mean() < 1e-3, "only where rounding decides between two codes that are equally near"
    restored = book.dequantize(expected, scales)
    assert torch.equal(restored, reference.dequant_with_qmap(expected, book.values, scales))
    ties = (restored - values).abs()[differing], (book.dequantize(codes, scales) - values).abs()[differing]
    torch.testing.assert_close(*ties, rtol=1e-4, atol=0)


@pytest.mark.parametrize("book", [SIGNED, UNSIGNED])
def test_the_look_up_finds_the_code_that_a_search_finds_at_every_boundary_and_everywhere(book):
    torch.manual_seed(0)
    up = torch.nextafter(book.boundaries, torch.tensor(2.0))
    down = torch.nextafter(book.boundaries, torch.tensor(-2.0))
    anywhere = torch.rand(200_000) * 2 - 1 if book is SIGNED else torch.rand(200_000)
    small = anywhere * 10.0 ** (-9 * torch.rand(200_000))
    values = torch.cat((book.boundaries, up, down, book.values, anywhere, small)).clamp(
        -1.0 if book is SIGNED else 0, 1
    )
    for part in values.split(STATE_BLOCK - 1):
        part = torch.cat((part, torch.ones(1)))  # so that the scale is 1
        codes, scales = book.quantize(part)
        assert scales.item() == 1.0
        assert torch.equal(codes.long(), torch.bucketize(part, book.boundaries, right=True))


@pytest.mark.parametrize("book", [SIGNED, UNSIGNED])
def test_what_the_data_type_has_is_kept_exactly(book):
    codes, scales = book.quantize(book.values)
    assert codes.tolist() == list(range(256))
    assert torch.equal(book.dequantize(codes, scales), book.values)


@given(count=st.integers(0, 3 * STATE_BLOCK), exponent=st.integers(-20, 20), signed=st.booleans())
def test_each_block_has_its_scale_and_an_error_of_at_most_half_a_gap(count, exponent, signed):
    book = SIGNED if signed else UNSIGNED
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 10.0**exponent
    values = values if signed else values.abs()
    before = values.clone()
    codes, scales = book.quantize(values)
    assert torch.equal(values, before), "the argument is left alone"
    assert codes.nbytes + scales.nbytes == state_bytes(count)
    restored = book.dequantize(codes, scales)
    largest = (book.values[1:] - book.values[:-1]).max().item() / 2
    for index, scale in enumerate(scales):
        block = slice(index * STATE_BLOCK, (index + 1) * STATE_BLOCK)
        assert scale == values[block].abs().max()
        assert (restored[block] - values[block]).abs().max() <= scale * largest * (1 + 1e-5)


def test_zeros_stay_zeros_beside_other_blocks():
    values = torch.cat((torch.zeros(STATE_BLOCK), torch.ones(STATE_BLOCK), torch.zeros(3)))
    for book in (SIGNED, UNSIGNED):
        codes, scales = book.quantize(values)
        assert scales.tolist() == [0.0, 1.0, 0.0]
        assert torch.equal(book.dequantize(codes, scales), values)


def test_a_second_moment_that_is_not_zero_does_not_become_zero():
    values = torch.full((STATE_BLOCK,), 1e-20)
    values[0] = 1.0
    assert (UNSIGNED.dequantize(*UNSIGNED.quantize(values)) > 0).all()
    assert (SIGNED.dequantize(*SIGNED.quantize(values))[1:] == 0).all(), "a first moment may"


def test_nan_and_infinity_are_not_hidden():
    for bad in (math.nan, math.inf):
        values = torch.ones(2 * STATE_BLOCK)
        values[3] = bad
        restored = SIGNED.dequantize(*SIGNED.quantize(values))
        assert not restored[:STATE_BLOCK].isfinite().any()
        assert (restored[STATE_BLOCK:] == 1).all()


@pytest.mark.parametrize(("value", "upper_share"), [(1 + 1 / 512, 0.25), (-3 - 3 / 256, 0.75), (1e-40, None)])
def test_stochastic_rounding_is_unbiased_and_gives_one_of_the_two_neighbors(value, upper_share):
    torch.manual_seed(0)
    rounded = round_stochastically_(torch.full((200_000,), value))
    assert torch.equal(rounded.bfloat16().float(), rounded)
    low, high = sorted(rounded.unique().tolist(), key=abs)
    assert abs(low) < abs(value) < abs(high)
    share = (rounded == high).double().mean().item()
    exact = (value - low) / (high - low)
    assert upper_share is None or exact == pytest.approx(upper_share)
    assert share == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 200_000))
    assert rounded.double().mean().item() == pytest.approx(value, abs=5 * abs(high - low) / 2 / math.sqrt(200_000))


def test_stochastic_rounding_keeps_what_bf16_has():
    every = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
    rounded = round_stochastically_(every.clone())
    assert torch.equal(rounded.isnan(), every.isnan())
    assert torch.equal(rounded[~every.isnan()], every[~every.isnan()]), "infinities and both zeros among them"


def test_stochastic_rounding_keeps_every_nan():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7FC0FFFF] * 100, dtype=torch.int32)  # -1: a NaN of all ones
    assert round_stochastically_(bits.view(torch.float32)).isnan().all()


def test_stochastic_rounding_draws_from_the_default_generator():
    def draw(seed):
        torch.manual_seed(seed)
        return round_stochastically_(torch.linspace(-1, 1, 1001))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
