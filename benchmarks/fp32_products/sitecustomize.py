"""Compute products of bf16 tensors on the CPU in fp32, and round them once.

    PYTHONPATH=benchmarks/fp32_products steplm compare cpu_muon

On processors without bf16 instructions, PyTorch's bf16 matrix products are 10 to 100 times slower than its fp32 ones.
With this folder on ``PYTHONPATH``, every Python process replaces the CPU kernels of matrix products, attention and
log-softmax. Results equal the native ones up to the order of sums and the rounding of intermediate results. Measured
memory stays the same, because steplm counts the inputs and outputs of kernels, not what they allocate inside.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
KERNELS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    ATTENTION,
    f"{ATTENTION}_backward",
    "_log_softmax",
    "_log_softmax_backward_data",
    *(f"{product}.out" for product in ("mm", "addmm", "bmm", "baddbmm")),  # in compiled layers
)

_library = torch.library.Library("aten", "IMPL")  # the kernels stay replaced for as long as it exists


def _replace(name: str) -> None:
    plain = torch.library.get_kernel(f"aten::{name}", "CPU")

    def in_fp32(keys: Any, *inputs: Any, **options: Any) -> Any:
        if inputs[0].dtype is not torch.bfloat16:
            return plain.call_boxed(keys, *inputs, **options)
        is_bf16 = [isinstance(each, torch.Tensor) and each.dtype is torch.bfloat16 for each in inputs]
        wide = [each.float() if narrow else each for each, narrow in zip(inputs, is_bf16, strict=True)]
        if "out" in options:
            return options["out"].copy_(plain.call_boxed(keys, *wide, **{**options, "out": options["out"].float()}))
        outputs = plain.call_boxed(keys, *wide, **options)
        if isinstance(outputs, torch.Tensor):
            return outputs.bfloat16()
        if name == ATTENTION:  # the log-sum-exp stays in fp32
            return outputs[0].bfloat16(), outputs[1]
        return tuple(each.bfloat16() for each in outputs)

    _library.impl(name, in_fp32, "CPU", with_keyset=True, allow_override=True)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that a kernel is replaced
    for kernel in KERNELS:
        _replace(kernel)
