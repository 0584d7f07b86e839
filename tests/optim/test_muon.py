"""Muon against PyTorch's, and against what orthogonalization means."""

import math

import pytest
import torch
from torch import nn

from steplm.cost.count import ByteCounter
from steplm.cost.formats import muon_step_bytes
from steplm.optim.adamw import AdamW
from steplm.optim.matrix import STATES
from steplm.optim.muon import Muon

SHAPES = {"tall": (40, 17), "wide": (17, 40), "square": (24, 24), "another": (24, 24)}


def pair():
    generator = torch.Generator().manual_seed(0)
    ours = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return ours, {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}


def run_both(ours, theirs, optimizer, reference):
    """Four steps, each with another ``grad_scale``: one that never changes would change nothing."""
    generator = torch.Generator().manual_seed(1)
    for grad_scale in (1.0, 0.3, 3.0, 1.0):
        for name, parameter in ours.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            theirs[name].grad = parameter.grad * grad_scale
        optimizer.step(0.02, grad_scale)
        reference.step()


def torch_muon(parameters):
    return torch.optim.Muon(list(parameters.values()), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def test_in_bf16_it_is_the_muon_of_pytorch():
    ours, theirs = pair()
    run_both(ours, theirs, Muon(ours, compute_dtype=torch.bfloat16), torch_muon(theirs))
    for name in ours:
        # One matrix product of a batch may round another bf16 bit than one of a single matrix.
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=5e-3, msg=name)
        assert (ours[name] - theirs[name]).abs().mean() < 2e-4


def test_in_fp32_it_is_the_muon_of_pytorch_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # PyTorch's orthogonalizes in bf16 only
    ours, theirs = pair()
    run_both(ours, theirs, Muon(ours), torch_muon(theirs))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (24, 24), (2, 30, 20)])
def test_the_update_has_the_gradients_singular_vectors_and_singular_values_near_one(shape):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    Muon({"w": weight}).step(1.0)
    updates = -weight.detach() / (0.2 * math.sqrt(max(shape[-2:])))
    for update, gradient in zip(updates.view(-1, *shape[-2:]), weight.grad.view(-1, *shape[-2:]), strict=True):
        values = torch.linalg.svdvals(update)
        assert 0.6 < values.min() < values.max() < 1.3, "the polynomial is steep at 0, and stays in a band around 1"
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        inside = left.T @ update @ right.T
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-4)


def test_the_update_has_the_size_of_adamws():
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape)
    Muon(weights).step(1.0)
    for name, weight in weights.items():
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3), name


@pytest.mark.parametrize("power", [-20, 20])
def test_the_size_of_a_gradient_does_not_matter(power):
    ours, theirs = pair()
    for first, second in zip(ours.values(), theirs.values(), strict=True):
        first.grad = torch.randn(first.shape, generator=torch.Generator().manual_seed(2))
        second.grad = first.grad * 2.0**power
    Muon(ours).step(0.1)
    Muon(theirs).step(0.1)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("shapes", [[(24, 24), (24, 24)], [(40, 17)], [(3, 17, 40)]])
def test_in_bf16_it_has_the_workspace_of_the_formula(shapes, states):
    named = {str(index): nn.Parameter(torch.randn(shape)) for index, shape in enumerate(shapes)}
    optimizer = Muon(named, states=states, compute_dtype=torch.bfloat16)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape)
    with ByteCounter() as counter:
        optimizer.step(1e-2)
    maps = [shape[-2:] for shape in shapes for _ in range(math.prod(shape[:-2]))]
    assert counter.peak_bytes == muon_step_bytes(maps, states=states, masters="fp32", compute_width=2)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("rows", [(24, 8, 8), (40, 40), (8, 24)])
def test_a_fused_matrix_is_updated_like_the_separate_ones_it_holds(rows, states):
    # 32 columns and a multiple of 8 rows: the maps begin at block boundaries of an 8-bit momentum.
    fused = nn.Parameter(torch.randn(sum(rows), 32))
    parts = {str(index): nn.Parameter(part.detach().clone()) for index, part in enumerate(fused.split(rows))}
    ours = Muon({"fused": fused}, states=states, row_blocks={(sum(rows), 32): rows})
    theirs = Muon(parts, states=states)
    for grad_scale in (1.0, 0.3):
        fused.grad = torch.randn(fused.shape)
        for parameter, gradient in zip(parts.values(), fused.grad.split(rows), strict=True):
            parameter.grad = gradient.clone()
        ours.step(0.02, grad_scale)
        theirs.step(0.02, grad_scale)
    torch.testing.assert_close(fused, torch.cat(list(parts.values())), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(24, 8, 8), (40, 40), (8, 24)])
def test_the_update_of_a_fused_matrix_has_the_workspace_of_the_formula(rows):
    shape = (sum(rows), 24)
    named = {name: nn.Parameter(torch.randn(shape)) for name in "ab"}
    optimizer = Muon(named, compute_dtype=torch.bfloat16, row_blocks={shape: rows})
    for parameter in named.values():
        parameter.grad = torch.randn(shape)
    with ByteCounter() as counter:
        optimizer.step(1e-2)
    options = {"states": "fp32", "masters": "fp32", "compute_width": 2, "row_blocks": {shape: rows}}
    assert counter.peak_bytes == muon_step_bytes([shape] * 2, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"states": "8bit", "master_weights": "8bit"}, {"master_weights": False}])
def test_on_a_gpu_its_update_is_that_of_a_cpu_and_its_peak_that_of_the_formula(options):
    shapes = {"q": (1024, 1024), "k": (1024, 1024), "up": (1280, 512)}
    of_cpu = {name: nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()}
    of_gpu = {name: nn.Parameter(parameter.detach().cuda()) for name, parameter in of_cpu.items()}
    optimizers = [Muon(of_cpu, compute_dtype=torch.bfloat16, **options), Muon(of_gpu, **options)]
    for name, parameter in of_cpu.items():
        parameter.grad = torch.randn_like(parameter)
        of_gpu[name].grad = parameter.grad.cuda()
    optimizers[1].step(0.0)  # loads what matrix products need
    optimizers[0].step(0.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for optimizer in optimizers:
        optimizer.step(0.02)
    taken = torch.cuda.max_memory_allocated() - before
    masters = {True: "fp32", False: "none", "8bit": "8bit"}[options.get("master_weights", True)]
    formula = muon_step_bytes(shapes.values(), states=options.get("states", "fp32"), masters=masters, compute_width=2)
    assert formula <= taken <= formula + 2**20  # the allocator rounds up
    for name, parameter in of_cpu.items():
        difference = (parameter.detach() - of_gpu[name].detach().cpu()).float()
        assert difference.square().mean().sqrt() < 0.02 * 0.2 * 0.1 + 2**-8, name


def test_a_gradient_that_is_not_finite_reaches_the_weights():
    for states in ("fp32", "bf16", "8bit"):
        weight = nn.Parameter(torch.ones(4, 6))
        weight.grad = torch.full((4, 6), torch.nan)
        Muon({"w": weight}, states=states).step(0.1)
        assert weight.isnan().all(), states


@pytest.mark.parametrize(
    ("states", "master_weights"), [("fp32", True), ("bf16", True), ("8bit", "8bit"), ("8bit", False), ("bf16", "8bit")]
)
def test_every_format_fits_a_linear_map_nearly_as_well_as_fp32(states, master_weights):
    def final_loss(**options):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(24, 32, generator=generator)
        weight = nn.Parameter(torch.zeros(24, 32, dtype=torch.bfloat16))
        optimizer = Muon({"w": weight}, weight_decay=0.0, **options)
        torch.manual_seed(0)
        for step in range(150):
            inputs = torch.randn(64, 32, generator=generator)
            loss = (inputs @ (weight.float() - target).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(0.1 * (1 - step / 150))
        return (weight.detach().float() - target).square().mean().item()

    assert final_loss(states=states, master_weights=master_weights) < 1e-3 + 2 * final_loss(), "it begins at 1"


def test_beside_adamw_for_all_else_a_small_model_learns():
    torch.manual_seed(0)
    embed, hidden = nn.Embedding(20, 16), nn.Linear(16, 16)
    rules = [Muon({"hidden.weight": hidden.weight}), AdamW({"embed": embed.weight, "hidden.bias": hidden.bias})]
    ids = torch.randint(0, 20, (64,))
    losses = []
    for _ in range(40):
        logits = torch.tanh(hidden(embed(ids))) @ embed.weight.T
        loss = nn.functional.cross_entropy(logits, (3 * ids + 1) % 20)
        loss.backward()
        losses.append(loss.item())
        for rule in rules:
            rule.step(2e-2)
            rule.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
