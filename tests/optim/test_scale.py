"""SCALE and its relatives against their formulas."""

import pytest
import torch
from torch import nn

from steplm.cost.count import ByteCounter
from steplm.cost.formats import scale_step_bytes
from steplm.errors import ConfigError
from steplm.optim.scale import NORMS, SCALE

SHAPE = (12, 20)  # out_features, in_features


def rms(matrix, dim):
    return matrix.square().mean(dim=dim, keepdim=True).sqrt()


def reference(norm, gradient):
    """The normalised gradient of a matrix (out_features, in_features), in fp64."""
    if norm == "sign":
        return gradient.sign()
    if norm in ("column", "both"):
        gradient = torch.stack([row / row.square().mean().sqrt() for row in gradient])
    if norm in ("row", "both"):
        gradient = torch.stack([column / column.square().mean().sqrt() for column in gradient.T]).T
    return gradient


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_its_formula_in_fp64(norm, momentum):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE))
    expected, held = weight.detach().double(), torch.zeros(SHAPE, dtype=torch.float64)
    optimizer = SCALE({"w": weight}, norm=norm, momentum=momentum, weight_decay=0.2)
    for grad_scale in (1.0, 0.3, 3.0, 1.0):
        weight.grad = torch.randn(SHAPE)
        held = momentum * held + (1 - momentum) * grad_scale * weight.grad.double()
        expected = (1 - 0.05 * 0.2) * expected - 0.05 * 0.2 * reference(norm, held)
        optimizer.step(0.05, grad_scale)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


def test_the_default_is_the_papers_and_has_no_state():
    """C(G) of the paper divides each column of a matrix (in, out) by its norm: one factor for each output feature."""
    weight = nn.Parameter(torch.zeros(SHAPE))
    weight.grad = torch.randn(SHAPE) * torch.logspace(-3, 3, 12).unsqueeze(1)
    optimizer = SCALE({"w": weight}, weight_decay=0.0)
    optimizer.step(1.0)
    columns = weight.grad.T / weight.grad.T.norm(dim=0)
    torch.testing.assert_close(-weight.detach().T, 0.2 * 20**0.5 * columns)
    assert optimizer.state_dict() == ({}, {"w": 1})


@pytest.mark.parametrize("norm", NORMS)
def test_the_update_has_the_size_of_adamws(norm):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(SHAPE))
    weight.grad = torch.randn(SHAPE) * 1e-3
    SCALE({"w": weight}, norm=norm).step(1.0)
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_and_columns_of_zeros_stay(norm):
    gradient = torch.randn(SHAPE)
    gradient[3], gradient[:, 5] = 0.0, 0.0
    weight = nn.Parameter(torch.ones(SHAPE))
    weight.grad = gradient
    SCALE({"w": weight}, norm=norm, weight_decay=0.0).step(1.0)
    assert (weight[3] == 1).all()
    assert (weight[:, 5] == 1).all()
    assert weight.isfinite().all()


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "sign"])  # PyTorch's sign of NaN is 0
def test_a_gradient_that_is_not_finite_reaches_the_weights(norm):
    weight = nn.Parameter(torch.ones(SHAPE))
    weight.grad = torch.ones(SHAPE)
    weight.grad[0, 0] = torch.nan
    SCALE({"w": weight}, norm=norm).step(1.0)
    assert weight[0, 0].isnan()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (200, 1), (1, 1)])
def test_every_norm_has_the_workspace_of_the_formula(norm, shape):
    weight = nn.Parameter(torch.randn(shape))
    optimizer = SCALE({"w": weight}, norm=norm)
    weight.grad = torch.randn(shape)
    with ByteCounter() as counter:
        optimizer.step(1e-2)
    assert counter.peak_bytes == scale_step_bytes([shape], states="fp32", masters="fp32", norm=norm)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ConfigError, match=r"'spectral'. Known: column, row, both, sign"):
        SCALE({}, norm="spectral")
