"""LoRA on one linear layer. Source: Hu et al., LoRA (arXiv 2106.09685)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steplm.pet.frozen_linear import FrozenLinear


class LoRALinear(FrozenLinear):
    """A linear layer plus a low-rank update: ``x W^T + b + scaling * (x A^T) B^T``.

    Takes over the parameters of the layer it replaces, which keep their names, and adds ``lora_A`` (rank, in) and
    ``lora_B`` (out, rank) in the weight's dtype and on its device. The weight can be packed later.

    Args:
        linear: the layer to replace.
        rank: rank of the update.
        scaling: alpha / rank.
    """

    factor_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    row_factor: ClassVar[str] = "lora_B"  # the factor with the same rows as the weight
    lora_A: nn.Parameter  # noqa: N815  (conventional names)
    lora_B: nn.Parameter  # noqa: N815

    def __init__(self, linear: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__(linear)
        self.rank, self.scaling = rank, scaling
        for name, shape in self.factor_shapes(linear.weight.shape, rank).items():
            self.register_parameter(name, nn.Parameter(linear.weight.new_zeros(shape)))

    def fresh_factors(self, seed: int, name: str) -> dict[str, Tensor]:
        """Kaiming-uniform A and zero B in fp32 on the CPU, determined only by the seed and the module's name."""
        # B starts at zero so that training starts from the frozen model. A must not: with both at zero, neither factor
        # would ever get a gradient.
        digest = hashlib.sha256(f"{seed}:{name}.lora_A".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # Drawn in fp32 on the CPU, so that device and dtype affect only the rounding.
        fresh = {key: torch.zeros(getattr(self, key).shape, device="cpu") for key in self.factor_names}
        nn.init.kaiming_uniform_(fresh["lora_A"], a=math.sqrt(5), generator=generator)
        return fresh

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        output = self.base(rows)
        # addmm fuses the addition into the matmul, which saves a tensor of the output's size and one rounding.
        output = torch.addmm(output, F.linear(rows, self.lora_A), self.lora_B.t(), alpha=self.scaling)
        return output.view(*input.shape[:-1], self.out_features)

    @staticmethod
    def factor_shapes(weight_shape: Sequence[int], rank: int) -> dict[str, tuple[int, int]]:
        """Shapes of the factors, by name, for a weight (out, in)."""
        return {"lora_A": (rank, weight_shape[1]), "lora_B": (weight_shape[0], rank)}

    @staticmethod
    def merge_weight(weight: Tensor, factors: Mapping[str, Tensor], scaling: float) -> Tensor:
        """``W + scaling * B A`` in fp32, rounded once to the weight's dtype."""
        A, B = factors["lora_A"].float(), factors["lora_B"].float()
        return torch.addmm(weight.float(), B, A, alpha=scaling).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"
