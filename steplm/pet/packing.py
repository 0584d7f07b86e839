"""Storage formats of a frozen matrix, and conversion to and from them.

``full`` is the matrix itself; ``int8`` has one fp32 scale per row; ``nf4`` is the 4-bit NormalFloat of QLoRA
(arXiv 2305.14314), section 3, with one bf16 scale per block. For their bytes, see ``steplm.cost.formats``.
To add a format, write a class with the methods of ``Format`` and add it to ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from statistics import NormalDist
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from steplm.cost.formats import NF4_BLOCK, PACK_CHUNK

CODES, SCALES = "weight_codes", "weight_scales"  # names of the tensors within a linear layer


class Part(NamedTuple):
    """Shape and dtype of one tensor of a packed matrix."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(Protocol):
    """How a matrix is stored. All three methods are deterministic and support fake tensors."""

    def parts(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Part]:
        """The tensors that store a matrix of this shape and dtype, by name."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Convert the matrix (out, in) to those tensors, on its device."""

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) in ``dtype``: codes times scales in fp32, rounded once."""


class Full:
    """The unchanged matrix; ``unpack`` does not copy it."""

    def parts(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Part]:
        return {CODES: Part(shape, dtype)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return {CODES: weight}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return parts[CODES]


class Int8:
    """Codes -127 … 127, with one scale per row: its largest magnitude / 127."""

    def parts(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Part]:
        return {SCALES: Part(shape[:1], torch.float32), CODES: Part(shape, torch.int8)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        scales = torch.linalg.vector_norm(weight, torch.inf, dim=1, dtype=torch.float32) / 127
        divisors = torch.where(scales > 0, scales, 1).unsqueeze(1)  # the scale of a row of zeros is 0
        codes = torch.empty_like(weight, dtype=torch.int8)
        rows = max(PACK_CHUNK // weight.shape[1], 1)
        for chunk, target, divisor in zip(weight.split(rows), codes.split(rows), divisors.split(rows), strict=True):
            target.copy_((chunk / divisor).round_())
        return {SCALES: scales, CODES: codes}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes = parts[CODES].view(-1)
        return _scaled(lambda start, stop: codes[start:stop].float(), parts[SCALES], shape[1], shape, dtype)


class NF4:
    """Two codes per byte in row-major order, the first in the upper half, with one scale per block."""

    def parts(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Part]:
        num_elements = shape[0] * shape[1]
        return {
            SCALES: Part((-(-num_elements // NF4_BLOCK),), torch.bfloat16),
            CODES: Part((-(-num_elements // 2),), torch.uint8),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        midpoints = (levels[1:] + levels[:-1]) / 2
        packed = [self._pack_chunk(chunk.float(), midpoints) for chunk in weight.reshape(-1).split(PACK_CHUNK)]
        return {SCALES: torch.cat([scales for scales, _ in packed]), CODES: torch.cat([codes for _, codes in packed])}

    def _pack_chunk(self, values: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
        blocks = F.pad(values, (0, -values.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
        scales = torch.linalg.vector_norm(blocks, torch.inf, dim=1).bfloat16()
        # Divide by the rounded scale, because that is what the codes will be multiplied by.
        divisors = torch.where(scales > 0, scales, 1).unsqueeze(1)
        codes = torch.bucketize(blocks / divisors, midpoints, out_int32=True).view(-1)[: values.numel()].byte()
        pairs = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        return scales, pairs[:, 0] * 16 + pairs[:, 1]

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes = parts[CODES]
        # A fake tensor needs a fake table, which must not outlive its mode in the cache.
        table = (_pair_table.__wrapped__ if isinstance(codes, FakeTensor) else _pair_table)(codes.device)

        def values(start: int, stop: int) -> Tensor:
            pairs = table.index_select(0, codes[start // 2 : (stop + 1) // 2].int())
            return pairs.view(torch.float32)[: stop - start]

        return _scaled(values, parts[SCALES], NF4_BLOCK, shape, dtype)


FORMATS: dict[str, Format] = {
    "full": Full(),
    "int8": Int8(),
    "nf4": NF4(),
}


def normal_float_levels() -> tuple[float, ...]:
    """The 16 values of NF4, ascending from -1 to 1: quantiles of the normal distribution, divided by the largest.

    Zero is one of them, with seven values below and eight above. The outermost quantile is the mean of two: those that
    leave half a step outside with 16 values and with 15. Source: QLoRA (arXiv 2305.14314), section 3, and the numbers
    in its appendix E.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (outermost - 0.5) * i / 7) for i in range(7, 0, -1)]
    return tuple(value / positive[-1] for value in (*negative, 0.0, *positive))


NF4_LEVELS = normal_float_levels()


@cache
def _pair_table(device: torch.device) -> Tensor:
    """The two fp32 levels of each byte, packed as one int64 so that one lookup fetches both; shape (256,)."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.cartesian_prod(levels, levels).view(torch.int64).view(-1)


def _scaled(
    values: Callable[[int, int], Tensor], scales: Tensor, block: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The matrix with elements ``start … stop`` equal to fp32 ``values(start, stop)`` times their block's scale."""
    weight = torch.empty(shape, dtype=dtype, device=scales.device)
    flat, num_elements = weight.view(-1), weight.numel()
    step = max(PACK_CHUNK // block, 1) * block
    for start in range(0, num_elements, step):
        stop = min(start + step, num_elements)
        chunk = values(start, stop)
        whole = (stop - start) // block
        first = start // block
        chunk[: whole * block].view(-1, block).mul_(scales[first : first + whole].unsqueeze(1))
        if first + whole < -(-stop // block):  # the last block may be short
            chunk[whole * block :].mul_(scales[-1])
        flat[start:stop].copy_(chunk)
        del chunk  # free it before the next chunk is allocated
    return weight
