"""A linear layer with a frozen weight that is materialized for each matmul and never saved by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steplm.pet.host import Offloaded
from steplm.pet.packing import CODES, FORMATS, SCALES


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, materialize: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.materialize = materialize
        return F.linear(rows, materialize(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients
        return (
            gradient @ ctx.materialize() if ctx.needs_input_grad[0] else None,
            None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def frozen_linear(rows: Tensor, materialize: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """``rows W^T + b`` for a frozen matrix ``W``.

    Args:
        rows: (N, in).
        materialize: returns the same ``W`` (out, in) on each call. It is called in the forward pass and again in the
            backward pass, so that autograd saves nothing.
        bias: (out,).
    """
    return _FrozenLinearFunction.apply(rows, materialize, bias)


# In a compiled layer, both matmuls are opaque custom ops. Otherwise the compiler would see that the same weight is
# materialized twice, do it once, and keep the result from the forward to the backward pass.


@torch.library.custom_op("steplm::frozen_linear", mutates_args=())
def _opaque_linear(
    rows: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, fmt: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return F.linear(rows, FORMATS[fmt].unpack({CODES: codes, SCALES: scales}, (shape[0], shape[1]), dtype), bias)


@torch.library.custom_op("steplm::frozen_linear_backward", mutates_args=())
def _opaque_backward(
    gradient: Tensor, codes: Tensor, scales: Tensor, fmt: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return gradient @ FORMATS[fmt].unpack({CODES: codes, SCALES: scales}, (shape[0], shape[1]), dtype)


@_opaque_linear.register_fake
def _(rows: Tensor, codes: Tensor, scales: Tensor, bias: Any, fmt: str, shape: Any, dtype: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], shape[0])


@_opaque_backward.register_fake
def _(gradient: Tensor, codes: Tensor, scales: Tensor, fmt: str, shape: Any, dtype: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[0], shape[1])


def _opaque_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, _, *ctx.how = inputs
    ctx.save_for_backward(codes, scales)


def _opaque_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_rows = _opaque_backward(gradient, *ctx.saved_tensors, *ctx.how) if ctx.needs_input_grad[0] else None
    to_bias = gradient.sum(0) if ctx.needs_input_grad[3] else None
    return to_rows, None, None, to_bias, None, None, None


_opaque_linear.register_autograd(_opaque_gradients, setup_context=_opaque_context)


class FrozenLinear(nn.Linear):
    """A linear layer whose weight can be packed: quantized, offloaded, or both.

    Takes over the parameters of the layer it replaces. Once packed, ``weight`` is ``None``, and the weight is stored in
    the buffers ``weight_codes`` and ``weight_scales`` or, if offloaded, in host memory.
    """

    format: str | None = None  # None: ``weight`` is an ordinary parameter
    offloaded: Offloaded | None = None
    dtype: torch.dtype  # of the materialized weight
    weight_codes: Tensor
    weight_scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dtype = linear.weight.dtype
        self.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight: (out, in)."""
        return self.out_features, self.in_features

    def base(self, rows: Tensor) -> Tensor:
        """``rows W^T + b`` for rows (N, in)."""
        if self.format is None:
            return F.linear(rows, self.weight, self.bias)
        if torch.compiler.is_compiling() and self.offloaded is None:
            return _opaque_linear(
                rows, self.weight_codes, self.weight_scales, self.bias, self.format, self.shape, self.dtype
            )
        return frozen_linear(rows, self.materialize, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        output = self.base(input.reshape(-1, self.in_features))
        return output.view(*input.shape[:-1], self.out_features)

    def materialize(self) -> Tensor:
        """The weight (out, in); it may share memory with the packed weight, so use it immediately."""
        if self.format is None:
            return self.weight
        parts = self.packed() if self.offloaded is None else self.offloaded.on_device()
        return FORMATS[self.format].unpack(parts, self.shape, self.dtype)

    def packed(self) -> dict[str, Tensor]:
        """The tensors of a packed weight that is not offloaded, by their names within this module."""
        names = FORMATS[self.format].parts(self.shape, self.dtype) if self.format else ()
        return {name: self.get_buffer(name) for name in names}

    def extra_repr(self) -> str:
        kept = "" if self.format is None else f", {self.format}" + (", offloaded" if self.offloaded else "")
        return super().extra_repr() + kept
