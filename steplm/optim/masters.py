"""Fp32 weights as a bf16 weight and one byte of what its rounding lost.

An fp32 number has a sign, 8 bits of exponent and 24 significant bits, 23 of them stored. The pair keeps the upper 24 of
its 32 bits: the same exponents, and 16 significant bits. ``weight`` is that number rounded to bf16 (8 significant
bits), and ``correction``, an int8, is the distance from there in units of 1/256 of the spacing of bf16 numbers, from
-0.5 to 0.5 of that spacing.

What is lost: each write rounds the value to nearest at 16 significant bits (ties away from zero), with an error of at
most 2**-16 of it; fp32 has 2**-24, bf16 alone 2**-8. So an update of less than 2**-16 of a weight may be lost. Exact
are all bf16 numbers, zeros and infinities among them; NaN stays NaN.

Source of the idea: FlashOptim (arXiv 2602.23349). Here the correction is an integer in units of the last place, so that
reading is one addition of bits and reading what was written is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from steplm.optim.quantized import round_stochastically_


def new_master(weight: Tensor, master_weights: bool | str) -> dict[str, Tensor]:
    """The state beside a bf16 weight: ``master`` (True), ``correction`` (``8bit``) or none (False); of fp32, none."""
    if weight.dtype == torch.float32 or not master_weights:
        return {}
    if master_weights == "8bit":
        return {"correction": torch.zeros_like(weight, dtype=torch.int8)}
    return {"master": weight.float()}


def _whole(state: Tensor) -> Tensor:
    return state


def read_weight(weight: Tensor, states: Mapping[str, Tensor], part: Callable[[Tensor], Tensor] = _whole) -> Tensor:
    """Fp32: the master weight, the weight itself if it is fp32, or else a copy.

    Args:
        weight: the part of the parameter that is read.
        states: those that ``new_master`` gave for the whole parameter, among others.
        part: cuts the same part out of such a state.
    """
    if "correction" in states:
        return correct(weight, part(states["correction"]))
    return part(states["master"]) if "master" in states else weight.float()  # no copy of what is fp32


def write_weight(
    value: Tensor, weight: Tensor, states: Mapping[str, Tensor], part: Callable[[Tensor], Tensor] = _whole
) -> None:
    """Round the fp32 ``value``, which ``read_weight`` gave and an update changed, into the weight.

    ``value`` may be overwritten, unless it is the master weight.
    """
    if "correction" in states:
        split_(value, weight, part(states["correction"]))
    elif "master" in states:
        weight.copy_(value)
    elif weight.dtype != torch.float32:
        weight.copy_(round_stochastically_(value))


def correct(weight: Tensor, correction: Tensor) -> Tensor:
    """The fp32 values, a new tensor, that a bf16 weight and its int8 correction stand for."""
    bits = weight.view(torch.int16).int().bitwise_left_shift_(16)
    return bits.add_(correction, alpha=256).view(torch.float32)


def split_(values: Tensor, weight: Tensor, correction: Tensor) -> None:
    """Write fp32 ``values`` into a bf16 ``weight`` and its int8 ``correction``; ``values`` are overwritten."""
    values.masked_fill_(values != values, torch.nan)  # to a NaN of all ones the additions below would carry over
    bits = values.view(torch.int32)
    bits.add_(0x80).bitwise_and_(-0x100)  # 24 bits, rounded to nearest
    upper = (bits + 0x8000).bitwise_right_shift_(16)  # 16 bits, rounded to nearest
    weight.view(torch.int16).copy_(upper)
    correction.copy_(bits.sub_(upper.bitwise_left_shift_(16)).bitwise_right_shift_(8))
