"""Block-wise 8-bit optimizer states, and stochastic rounding of bf16 weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steplm.cost.formats import STATE_BLOCK

_of_this_thread = threading.local()


def dynamic_tree(signed: bool) -> list[float]:
    """The 256 values of the dynamic tree data type in ascending order, the largest of them 1.

    The values cover seven decades. The decade below 1 has 64 values of either sign (unsigned: 128), and each lower one
    half as many: the midpoints of that many equal parts of [0.1, 1] x its power of ten. 0 and 1 are added.
    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 1.3.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        num_parts = 2**decade if signed else 2 ** (decade + 1)
        for part in range(num_parts):
            value = (0.1 + 0.9 * (part + 0.5) / num_parts) * 10.0 ** (decade - 6)
            values += [value, -value] if signed else [value]
    return sorted(values)


class CodeBook:
    """Quantizes fp32 tensors to 8 bits, with one fp32 scale, the largest magnitude, per ``STATE_BLOCK`` elements.

    Tensors are flat; their last block may be short. An unsigned code book never rounds a nonzero value to 0: Adam
    divides by the root of the second moment, and would take huge steps where small values were lost.

    The tables belong to an object instead of a module-level cache, so that they are fake under fake tensors and real
    otherwise.
    """

    def __init__(self, *, signed: bool, device: torch.device | str) -> None:
        self.values = torch.tensor(dynamic_tree(signed), device=device)
        self.boundaries = (self.values[:-1] + self.values[1:]) / 2  # a value's code is the number of these <= the value
        if not signed:
            self.boundaries[0] = torch.finfo(torch.float32).tiny
        # A binary search of the boundaries takes eight steps. The upper 16 bits of an fp32 number identify a cell of so
        # few numbers that it contains at most one boundary, so a lookup and one comparison find the code.
        cells = torch.arange(2**16, dtype=torch.int32, device=device) << 16
        first = torch.where(cells < 0, cells | 0xFFFF, cells).view(torch.float32)  # the lowest number of each cell
        codes = torch.bucketize(first, self.boundaries, right=True)
        self._cell_code = codes.to(torch.uint8)
        self._cell_boundary = torch.cat((self.boundaries, self.boundaries.new_tensor([torch.inf])))[codes]

    def tables(self) -> list[Tensor]:
        return [self.values, self.boundaries, self._cell_code, self._cell_boundary]

    def quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 codes and fp32 scales of a flat fp32 tensor."""
        codes = torch.empty_like(values, dtype=torch.uint8)
        scales = values.new_empty(-(-values.numel() // STATE_BLOCK))
        self.quantize_(values.clone(), codes, scales)
        return codes, scales

    def quantize_(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Quantize into ``codes`` and ``scales``; ``values`` are overwritten."""
        for block, scale in _blocks(values, scales):
            torch.amax(torch.abs(block), dim=1, out=scale)
            # In a block of zeros, 0 / tiny is 0, and the scale stays 0.
            block.div_(scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
        cells = (values.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        above = values >= self._cell_boundary.index_select(0, cells)
        torch.add(self._cell_code.index_select(0, cells), above, out=codes)

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The flat fp32 tensor that codes and scales represent."""
        values = self.values.index_select(0, codes.int())
        for block, scale in _blocks(values, scales):
            block.mul_(scale.unsqueeze(1))
        return values


def _blocks(values: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The full blocks as rows, then the short one, each with its scales."""
    num_whole = values.numel() // STATE_BLOCK
    parts = [(values[: num_whole * STATE_BLOCK].view(-1, STATE_BLOCK), scales[:num_whole])]
    if num_whole < len(scales):
        parts.append((values[num_whole * STATE_BLOCK :].view(1, -1), scales[num_whole:]))
    return parts


def round_stochastically_(values: Tensor) -> Tensor:
    """Round each fp32 value in place to one of its two bf16 neighbors, so that its expectation is the value itself.

    Values that bf16 can represent do not change, including infinities; NaN stays NaN. The random bits come from the
    device's default generator, unless ``rounding_bits_from`` names another.
    """
    # The 16 bits that bf16 lacks measure the distance to the lower neighbor. Adding 16 random bits carries to the upper
    # neighbor with a probability proportional to that distance.
    generator = getattr(_of_this_thread, "generator", None)
    noise = torch.randint(0, 2**16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    noise.masked_fill_(values != values, 0)  # a carry would turn a NaN of all one bits into 0
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    return values


@contextmanager
def rounding_bits_from(generator: torch.Generator) -> Iterator[None]:
    """Inside this context, ``round_stochastically_`` draws from ``generator`` when this thread calls it.

    A thread that updates beside others needs one of its own: they would draw from the default generator in any order.
    """
    _of_this_thread.generator = generator
    try:
        yield
    finally:
        _of_this_thread.generator = None
