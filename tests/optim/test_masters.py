"""A bf16 weight and one byte of what its rounding lost, instead of an fp32 master weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steplm.optim.adamw import AdamW
from steplm.optim.masters import correct, split_
from steplm.optim.muon import Muon

NUM_STEPS = 1000


def split(values):
    weight = torch.empty_like(values, dtype=torch.bfloat16)
    correction = torch.empty_like(values, dtype=torch.int8)
    split_(values.clone(), weight, correction)
    return weight, correction


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**120), max_value=2.0**120, allow_subnormal=False)))
def test_sixteen_significant_bits_are_kept_rounded_to_nearest(numbers):
    values = torch.tensor(numbers)
    kept = correct(*split(values))
    assert ((kept.double() - values.double()).abs() <= values.double().abs() * 2.0**-16).all()
    assert (kept.view(torch.int32) & 0xFF == 0).all(), "24 of 32 bits"


def test_the_weight_is_the_kept_value_rounded_to_bf16_and_the_correction_at_most_half_a_spacing():
    torch.manual_seed(0)
    values = torch.randn(100_000) * torch.logspace(-10, 10, 100_000)
    weight, correction = split(values)
    kept = correct(weight, correction)
    ties = correction == -128  # half a spacing: both neighbors are nearest
    assert torch.equal(weight[~ties], kept[~ties].bfloat16())
    spacing = torch.exp2(torch.floor(torch.log2(kept[ties].abs().double()))) * 2.0**-7
    assert ((weight[ties].double() - kept[ties].double()).abs() <= spacing / 2).all()


def test_what_was_written_is_read_back_exactly_however_often():
    torch.manual_seed(0)
    pair = split(torch.randn(10_000))
    again = split(correct(*pair))
    assert torch.equal(pair[0], again[0])
    assert torch.equal(pair[1], again[1])


def test_every_bf16_number_is_kept_exactly_and_no_nan_is_hidden():
    every = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
    weight, correction = split(every)
    assert torch.equal(weight.isnan(), every.isnan())
    assert not correction[~every.isnan()].any()
    assert torch.equal(correct(weight, correction).nan_to_num(0), every.nan_to_num(0))
    of_all_ones = torch.tensor([0x7FFFFFFF, -1, 0x7FC0FFFF], dtype=torch.int32).view(torch.float32)
    assert correct(*split(of_all_ones)).isnan().all()


def test_updates_that_bf16_would_lose_add_up():
    weight, correction = split(torch.ones(8))
    plain = torch.ones(8, dtype=torch.bfloat16)
    for _ in range(1000):
        split_(correct(weight, correction) + 1e-4, weight, correction)
        plain += 1e-4
    assert torch.equal(plain, torch.ones_like(plain))
    torch.testing.assert_close(correct(weight, correction), torch.full((8,), 1.1), rtol=1e-2, atol=0)


def final(rule, dtype, **options):
    """The weight after ``NUM_STEPS`` of noisy regression, its held value, and its loss."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, 24, generator=generator)
    weight = nn.Parameter(torch.randn(16, 24, generator=generator).bfloat16().to(dtype))
    optimizer = rule({"w": weight}, **options)
    for step in range(NUM_STEPS):
        inputs = torch.randn(32, 24, generator=generator)
        optimizer.zero_grad()
        # The gradient is that at the held fp32 value: what differs is what is kept of the update.
        held = _held(optimizer, weight)
        weight.grad = ((inputs @ (held - target).T).T @ inputs / 32).to(dtype)
        optimizer.step(1e-2 * (1 - step / NUM_STEPS))
    held = _held(optimizer, weight)
    return held, (held - target).square().mean().item()


def _held(optimizer, weight):
    states = optimizer.state_tensors()["w"]
    if "correction" in states:
        return correct(weight.detach(), states["correction"])
    return states.get("master", weight.detach()).float()


def test_over_a_thousand_steps_of_muon_it_stays_with_fp32_where_bf16_alone_does_not():
    exact, exact_loss = final(Muon, torch.bfloat16)
    kept, kept_loss = final(Muon, torch.bfloat16, master_weights="8bit")
    torch.manual_seed(0)
    rounded, _ = final(Muon, torch.bfloat16, master_weights=False)
    error, error_alone = ((held - exact).square().mean().sqrt().item() for held in (kept, rounded))
    assert error < 1e-3 < error_alone
    assert kept_loss == pytest.approx(exact_loss, rel=1e-2)


def test_over_a_thousand_steps_of_adamw_it_stays_with_fp32():
    """AdamW on an fp32 weight, taken through the pair after every step."""

    def run(through_pair):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(16, 24, generator=generator)
        weight = nn.Parameter(torch.zeros(16, 24))
        optimizer = AdamW({"w": weight})
        for step in range(NUM_STEPS):
            inputs = torch.randn(32, 24, generator=generator)
            weight.grad = (inputs @ (weight.detach() - target).T).T @ inputs / 32
            optimizer.step(1e-2 * (1 - step / NUM_STEPS))
            if through_pair:
                weight.data.copy_(correct(*split(weight.detach())))
        return weight.detach()

    exact, kept = run(False), run(True)
    assert 0 < (kept - exact).square().mean().sqrt() < 1e-4
