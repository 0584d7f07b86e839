"""Products of bf16 tensors in fp32, for suites on processors without bf16 instructions: as PyTorch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks" / "fp32_products"
PROGRAM = """
import runpy, sys
import torch
import torch.nn.functional as F

def results():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(8, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    heads = torch.randn(1, 2, 16, 8, generator=generator).bfloat16().requires_grad_()
    attention = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    outputs = [a @ b, F.linear(a, b, c[0]), torch.bmm(a[None], b[None]), torch.baddbmm(c, a[None], b[None])]
    outputs += [attention, F.log_softmax(a, -1)]
    gradients = torch.autograd.grad(sum(each.float().square().sum() for each in outputs), (a, b, c, heads))
    with torch.no_grad():
        outputs += [torch.mm(a, b, out=a.new_empty(8, 8)), torch.addmm(c, a, b, out=a.new_empty(8, 8))]
        outputs += [torch.bmm(heads[0], heads[0].mT, out=a.new_empty(2, 16, 16))]
    return [*outputs, *gradients], a.detach().float() @ b.detach().float()

native, native_fp32 = results()
runpy.run_path(sys.argv[1])
replaced, replaced_fp32 = results()
assert torch.equal(native_fp32, replaced_fp32)
for ours, theirs in zip(replaced, native, strict=True):
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6 * float(theirs.abs().max()))
"""


def test_replaced_kernels_give_what_those_of_pytorch_give() -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", PROGRAM, str(FOLDER / "sitecustomize.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
