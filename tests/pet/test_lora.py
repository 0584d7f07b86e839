"""LoRA as one autograd function, against the same sum of separate operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from steplm.pet.frozen import pack_frozen
from steplm.pet.lora import LoRALinear

IN, OUT, RANK = 24, 40, 3


def adapted(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> LoRALinear:
    torch.manual_seed(0)
    linear = LoRALinear(nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False), RANK, 1.7)
    nn.init.normal_(linear.lora_A)
    nn.init.normal_(linear.lora_B)
    return linear


def separate(linear: LoRALinear, x: Tensor) -> Tensor:
    """The same from separate operations, with one more rounding."""
    low = F.linear(x, linear.lora_A)
    return F.linear(x, linear.materialize().clone(), linear.bias) + linear.scaling * F.linear(low, linear.lora_B)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn(*output.shape[:-1], 2 * OUT)[..., ::2].to(output.dtype))


@pytest.mark.parametrize(("fmt", "offload"), [("full", False), ("full", True), ("int8", False), ("nf4", True)])
def test_output_and_gradients_are_those_of_separate_operations(fmt: Any, offload: bool) -> None:
    linear = adapted()
    if fmt != "full" or offload:
        pack_frozen(nn.ModuleDict({"layers": nn.ModuleList([linear])}), "layers", [0], fmt=fmt, offload=offload)
    x = torch.randn(2, 5, IN, requires_grad=True)
    inputs = (x, linear.lora_A, linear.lora_B)
    found, expected = linear(x), separate(linear, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    again = checkpoint(linear, x, use_reentrant=False)
    assert all(map(torch.equal, gradients(again, *inputs), gradients(linear(x), *inputs)))


def test_gradients_are_those_of_finite_differences_whichever_are_asked_for() -> None:
    linear = adapted(torch.double)
    x = torch.randn(4, IN, dtype=torch.double)
    tensors = (x, linear.weight, linear.bias, linear.lora_A, linear.lora_B)
    for asked in [*({tensor} for tensor in tensors), set(tensors), {x, linear.lora_A, linear.lora_B}]:
        for tensor in tensors:
            tensor.requires_grad_(tensor in asked)
        assert torch.autograd.gradcheck(lambda *_: linear(x), tensors)


def test_a_layer_used_twice_sums_both_gradients() -> None:
    linear = adapted(torch.double)
    x, y = (torch.randn(4, IN, dtype=torch.double, requires_grad=True) for _ in range(2))
    inputs = (x, y, linear.lora_A, linear.lora_B)
    found = gradients(linear(x).tanh() + linear(y), *inputs)
    expected = gradients(separate(linear, x).tanh() + separate(linear, y), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_refused() -> None:
    linear = adapted()
    x = torch.randn(4, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Operations(TorchDispatchMode):
    """Counts operations that are not views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_pass_are_products_and_nothing_else() -> None:
    linear, x = adapted(bias=False), torch.randn(2, 5, IN, requires_grad=True) * 1
    with Operations() as forward:
        output = linear(x)
    assert forward.counts == {"mm": 2, "addmm_": 1}
    gradient = torch.randn_like(output)
    with Operations() as backward:
        torch.autograd.grad(output, (x, linear.lora_A, linear.lora_B), gradient)
    assert backward.counts == {"mm": 2, "addmm_": 1, "addmm": 2}


def test_without_a_gradient_of_the_input_the_weight_is_used_once() -> None:
    linear, x = adapted(bias=False), torch.randn(5, IN)
    output = linear(x)
    with Operations() as backward:
        output.sum().backward()
    assert backward.counts["mm"] == 1, "the gradient of x A^T"
    assert backward.counts["addmm_"] == 0
    assert x.grad is None
    assert linear.lora_A.grad is not None


def test_autograd_saves_the_input_once_and_the_low_rank_product() -> None:
    linear, x = adapted(), torch.randn(2, 5, IN, requires_grad=True) * 1
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):  # type: ignore[func-returns-value]
        linear(x)
        linear(x)
    parameters = {parameter.data_ptr() for parameter in linear.parameters()}
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in saved if tensor.data_ptr() not in parameters}
    assert sorted(sizes.values()) == [10 * RANK, 10 * RANK, 10 * IN]


def test_a_compiled_layer_has_no_graph_break_and_computes_the_same() -> None:
    linear, x = adapted(), torch.randn(2, 5, IN, requires_grad=True)
    inputs = (x, linear.lora_A, linear.lora_B)
    expected = [linear(x), *gradients(linear(x), *inputs)]
    linear.compile(backend="aot_eager", fullgraph=True)
    found = [linear(x), *gradients(linear(x), *inputs)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
