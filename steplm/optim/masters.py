"""Fp32 weights stored as a bf16 weight plus one byte for its rounding error.

An fp32 number has a sign, 8 exponent bits and 24 significant bits, 23 of them stored. The pair keeps the upper 24 of
its 32 bits: the same exponents, and 16 significant bits. ``weight`` is that number rounded to bf16 (8 significant
bits). ``correction``, an int8, is the remaining distance in units of 1/256 of the spacing of bf16 numbers, from -0.5 to
0.5 of that spacing.

Each write rounds the value to nearest at 16 significant bits (ties away from zero), with a relative error of at most
2**-16; fp32 has 2**-24, bf16 alone 2**-8. An update of less than 2**-16 of a weight may therefore be lost. All bf16
numbers are exact, including zeros and infinities; NaN stays NaN.

The idea is from FlashOptim (arXiv 2602.23349). Here the correction is an integer in units of the last place, so that
reading takes a single integer addition and returns exactly what was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from steplm.optim.quantized import round_stochastically_


def new_master(weight: Tensor, master_weights: bool | str) -> dict[str, Tensor]:
    """The state for a bf16 weight: ``master`` (True), ``correction`` (``8bit``) or none (False); fp32 weights: none."""
    if weight.dtype == torch.float32 or not master_weights:
        return {}
    if master_weights == "8bit":
        return {"correction": torch.zeros_like(weight, dtype=torch.int8)}
    return {"master": weight.float()}


def _whole(state: Tensor) -> Tensor:
    return state


def read_weight(weight: Tensor, states: Mapping[str, Tensor], part: Callable[[Tensor], Tensor] = _whole) -> Tensor:
    """The weight in fp32: the master weight, the weight itself if it is fp32, or else a new tensor.

    Args:
        weight: the slice of the parameter to read.
        states: states of the whole parameter, including any from ``new_master``.
        part: takes the same slice of such a state.
    """
    if "correction" in states:
        return correct(weight, part(states["correction"]))
    return part(states["master"]) if "master" in states else weight.float()  # does not copy an fp32 weight


def write_weight(
    value: Tensor, weight: Tensor, states: Mapping[str, Tensor], part: Callable[[Tensor], Tensor] = _whole
) -> None:
    """Round the fp32 ``value``, an updated result of ``read_weight``, into the weight.

    May overwrite ``value``, unless it is the master weight.
    """
    if "correction" in states:
        split_(value, weight, part(states["correction"]))
    elif "master" in states:
        weight.copy_(value)
    elif weight.dtype != torch.float32:
        weight.copy_(round_stochastically_(value))


def correct(weight: Tensor, correction: Tensor) -> Tensor:
    """A new tensor with the fp32 values that a bf16 weight and its int8 correction represent."""
    bits = weight.view(torch.int16).int().bitwise_left_shift_(16)
    return bits.add_(correction, alpha=256).view(torch.float32)


def split_(values: Tensor, weight: Tensor, correction: Tensor) -> None:
    """Write fp32 ``values`` into a bf16 ``weight`` and its int8 ``correction``; ``values`` are overwritten."""
    values.masked_fill_(values != values, torch.nan)  # the additions below would overflow a NaN of all one bits
    bits = values.view(torch.int32)
    bits.add_(0x80).bitwise_and_(-0x100)  # 24 bits, rounded to nearest
    upper = (bits + 0x8000).bitwise_right_shift_(16)  # 16 bits, rounded to nearest
    weight.view(torch.int16).copy_(upper)
    correction.copy_(bits.sub_(upper.bitwise_left_shift_(16)).bitwise_right_shift_(8))
