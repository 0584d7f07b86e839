"""The update inside the backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from steplm.errors import SteplmError
from steplm.optim import adamw as module
from steplm.optim.adamw import AdamW
from steplm.optim.base import global_grad_norm


class Tied(nn.Module):
    """Two layers of 300 elements and more, a head that is the embedding, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.frozen = nn.Linear(24, 24).requires_grad_(False)

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + self.frozen(F.silu(layer(hidden)))
        return F.linear(hidden, self.embed.weight)


def build(dtype, **options):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    return model, AdamW({n: p for n, p in model.named_parameters() if p.requires_grad}, **options)


def loss_of(model, step):
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_it_equals_backward_and_step_bit_for_bit(monkeypatch, states, dtype):
    monkeypatch.setattr(module, "STEP_CHUNK", 512)
    model, optimizer = build(dtype, states=states)
    reference, stepping = build(dtype, states=states)
    for step in range(4):
        with optimizer.in_backward(1e-2) as norm:
            loss_of(model, step).backward()
        loss_of(reference, step).backward()
        expected_norm = global_grad_norm(reference.parameters())
        stepping.step(1e-2)
        stepping.zero_grad()
        assert norm.total().dtype == torch.float32
        assert norm.total().item() == pytest.approx(expected_norm.item(), rel=1e-6)
    assert equal(model.state_dict(), reference.state_dict())
    assert equal(optimizer.state_dict()[0], stepping.state_dict()[0])
    assert optimizer.steps == stepping.steps
    assert optimizer.steps["embed.weight"] == 4, "once a step, though it has two uses"
    assert optimizer.steps["unused"] == 0


def test_without_masters_a_seed_decides_every_bit():
    def run(seed):
        model, optimizer = build(torch.bfloat16, master_weights=False, states="8bit")
        for step in range(3):
            torch.manual_seed(seed + step)
            with optimizer.in_backward(1e-4):
                loss_of(model, step).backward()
        return model.state_dict()

    assert equal(run(0), run(0))
    assert not equal(run(0), run(10))


def test_no_two_gradients_exist_at_once_and_none_is_left():
    model, optimizer = build(torch.float32)
    counts = []

    def count(_):
        counts.append(sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in optimizer.parameters.values():
        parameter.register_post_accumulate_grad_hook(count)  # runs before the update
    with optimizer.in_backward(1e-2):
        loss_of(model, 0).backward()
    assert counts == [1] * 5
    count(None)
    assert counts[-1] == 0


def test_a_measurement_updates_nothing_and_leaves_no_gradient():
    model, optimizer = build(torch.bfloat16, states="8bit")
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with optimizer.in_backward(None) as norm:
        loss_of(model, 0).backward()
    assert equal(model.state_dict(), before[0])
    assert equal(optimizer.state_dict()[0], before[1][0])
    assert optimizer.steps == before[1][1]
    assert all(parameter.grad is None for parameter in model.parameters())
    loss_of(model, 0).backward()
    assert norm.total().item() == pytest.approx(global_grad_norm(model.parameters()).item(), rel=1e-6)


def test_outside_the_context_gradients_stay():
    model, optimizer = build(torch.float32)
    with pytest.raises(ZeroDivisionError), optimizer.in_backward(1e-2):
        raise ZeroDivisionError
    loss_of(model, 0).backward()
    assert all(p.grad is not None for name, p in optimizer.parameters.items() if name != "unused")
    assert set(optimizer.steps.values()) == {0}


def test_a_second_backward_pass_is_refused():
    model, optimizer = build(torch.float32)
    with optimizer.in_backward(1e-2):
        loss_of(model, 0).backward()
        with pytest.raises(SteplmError, match="arrived twice") as error:
            loss_of(model, 1).backward()
    assert error.value.name in optimizer.parameters
    assert set(optimizer.steps.values()) == {0, 1}


def test_it_works_through_checkpointed_layers():
    def run(checkpointed):
        model, optimizer = build(torch.float32)
        if checkpointed:
            for layer in model.layers:
                plain = layer.forward
                layer.forward = lambda x, plain=plain: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
        for step in range(2):
            with optimizer.in_backward(1e-2):
                loss_of(model, step).backward()
        return model.state_dict()

    assert equal(run(True), run(False))


def test_an_optimizer_of_nothing_measures_zero():
    with AdamW({}).in_backward(1e-3) as norm:
        pass
    assert norm.total().item() == 0.0
