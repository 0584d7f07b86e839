"""LoRA on one linear layer. Source: Hu et al., LoRA (arXiv 2106.09685)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steplm.errors import ConfigError
from steplm.pet.frozen_linear import FrozenLinear


class _LoRAFunction(torch.autograd.Function):
    """Both products and their sum as one node of the graph, so that autograd adds no gradients of the input.

    Autograd saves the input and ``x A^T``, as it does for separate operations. Recomputing ``x A^T`` would save
    ``w N r`` bytes, but take a sixth more operations for the adapter's products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        materialize: Callable[[], Tensor],
    ) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        low = F.linear(rows, A)
        output = F.linear(rows, materialize(), bias).addmm_(low, B.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, low, A, B)
        ctx.shape, ctx.scaling, ctx.materialize = input.shape, scaling, materialize
        return output.view(*input.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, low, A, B = ctx.saved_tensors
        of_input, of_weight, of_bias, of_A, of_B, *_ = ctx.needs_input_grad
        gradient = gradient.reshape(-1, gradient.shape[-1])
        to_input = to_A = None
        if of_input or of_A:
            to_low = gradient @ B
        if of_input:
            to_input = gradient @ (ctx.materialize() if weight is None else weight)
            to_input = to_input.addmm_(to_low, A, alpha=ctx.scaling).view(ctx.shape)
        if of_A:  # with beta=0, the first argument only gives the shape
            to_A = torch.addmm(A, to_low.t(), rows, beta=0, alpha=ctx.scaling)
        return (
            to_input,
            gradient.t() @ rows if of_weight else None,
            gradient.sum(0) if of_bias else None,
            to_A,
            torch.addmm(B, gradient.t(), low, beta=0, alpha=ctx.scaling) if of_B else None,
            None,
            None,
        )


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
        if not torch.compiler.is_compiling():
            weight = self.weight if self.format is None else None
            output: Tensor = _LoRAFunction.apply(
                input, weight, self.bias, self.lora_A, self.lora_B, self.scaling, self.materialize
            )
            return output
        # As separate operations, which the compiler fuses.
        rows = input.reshape(-1, self.in_features)
        output = torch.addmm(self.base(rows), F.linear(rows, self.lora_A), self.lora_B.t(), alpha=self.scaling)
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


def require_rank(name: str, module: nn.Linear | nn.Embedding, rank: int) -> None:
    """Require a rank that is at most the smaller side of the module's matrix.

    Raises:
        ConfigError: it is higher.
    """
    shape = tuple(module.weight.shape)
    if rank > min(shape):
        raise ConfigError(
            f"pet.rank {rank} is more than the smaller side of {name}, {shape[0]} x {shape[1]}. Lower pet.rank.",
            rank=rank,
            shape=shape,
        )
