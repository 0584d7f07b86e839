import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steplm.pet.frozen import pack_frozen
from steplm.pet.frozen_linear import frozen_linear
from steplm.pet.lora import LoRALinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_frozen_linear_equals_a_plain_product_in_value_and_gradient(dtype, with_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 5, dtype=dtype), torch.randn(7, dtype=dtype) if with_bias else None
    rows, again = (torch.ones(3, 5, dtype=dtype).mul_(0.3).requires_grad_() for _ in range(2))
    found, expected = frozen_linear(rows, lambda: weight, bias), F.linear(again, weight, bias)
    assert torch.equal(found, expected)
    gradient = torch.randn(3, 7, dtype=dtype)
    found.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(rows.grad, again.grad)
    with torch.no_grad():
        assert torch.equal(frozen_linear(rows, lambda: weight, bias), expected)


def test_the_gradient_of_frozen_linear_is_that_of_finite_differences():
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, dtype=torch.double), torch.randn(4, dtype=torch.double, requires_grad=True)
    rows = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: frozen_linear(x, lambda: weight, b), (rows, bias))


@pytest.mark.parametrize("fmt", ["int8", "nf4"])
def test_a_compiled_layer_computes_the_same_and_saves_no_weight_either(fmt):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = LoRALinear(nn.Linear(6, 10), 2, 1.0), nn.Linear(10, 6, bias=False)
            self.requires_grad_(False)
            self.up.lora_A.requires_grad_().data.normal_()
            self.up.lora_B.requires_grad_().data.normal_()

        def forward(self, x):
            return self.down(self.up(x).tanh())

    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Layer()])})
    pack_frozen(model, "layers", [0], fmt=fmt, offload=False)
    layer, x = model["layers"][0], torch.randn(3, 7, 6, requires_grad=True)

    def output_and_gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            output = layer(x)
        return [output, *torch.autograd.grad(output.sum(), [x, layer.up.lora_A, layer.up.lora_B])], saved

    expected, _ = output_and_gradients()
    layer.compile(backend="aot_eager", fullgraph=True)
    found, saved = output_and_gradients()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(saved) > 2, "the compiled layer saves something"
    assert not [t.shape for t in saved if t.is_floating_point() and tuple(t.shape) in ((6, 10), (10, 6))]
