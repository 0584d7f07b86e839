"""Parameters in host memory: each gradient leaves at once, sums are exact, and only new weights come back."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from steplm.optim.adamw import AdamW
from steplm.optim.build import UpdateRules
from steplm.optim.host import HostParameters
from steplm.types import HOST_GRADIENTS, HOST_WEIGHTS

CPU = torch.device("cpu")


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loss(of: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, 5, generator=generator).to(next(of.parameters()).dtype)
    return of(inputs).float().square().mean()


def on_host(of: nn.Module, *, sums: bool) -> HostParameters:
    host = HostParameters(CPU, sums=sums)
    host.set_parameters(dict(of.named_parameters()))
    return host


def gradients_of(seed: int) -> list[Tensor]:
    alone = model()
    loss(alone, seed).backward()
    return [parameter.grad for parameter in alone.parameters() if parameter.grad is not None]


def assert_gradients(host: HostParameters, expected: Iterable[Tensor], dtype: torch.dtype) -> None:
    for copy, gradient in zip(host.parameters.values(), expected, strict=True):
        assert copy.grad is not None
        assert copy.grad.dtype == dtype
        assert torch.equal(copy.grad, gradient)


def test_a_gradient_leaves_the_device_before_the_next_one_is_made() -> None:
    of = model()
    host = on_host(of, sums=False)
    on_device: list[int] = []
    for parameter in of.parameters():
        parameter.register_hook(
            lambda gradient: on_device.append(sum(p.grad is not None for p in of.parameters()))  # type: ignore[func-returns-value]
        )
    loss(of, 0).backward()
    assert on_device == [0, 0, 0, 0]
    assert host._leaving is None, "the last one is let go when the pass ends"
    assert all(parameter.grad is None for parameter in of.parameters())
    assert_gradients(host, gradients_of(0), torch.bfloat16)


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    of = model()
    host = on_host(of, sums=True)
    for seed in range(5):
        loss(of, seed).backward()
    host.wait()
    sums = [sum(parts[1:], parts[0].float()) for parts in zip(*map(gradients_of, range(5)), strict=True)]
    assert_gradients(host, sums, torch.float32)


def test_freed_gradients_do_not_come_back_in_the_next_sum() -> None:
    of = model()
    host = on_host(of, sums=True)
    rules = UpdateRules({}, host.parameters, host)
    for seed in (1, 0):
        rules.zero_grad()
        loss(of, seed).backward()
    assert_gradients(host, [gradient.float() for gradient in gradients_of(0)], torch.float32)


def test_an_update_changes_the_device_only_where_there_was_a_gradient() -> None:
    of = model()
    host = on_host(of, sums=False)
    rules = UpdateRules({"adamw": AdamW(host.parameters)}, host.parameters, host)
    before = {name: parameter.detach().clone() for name, parameter in of.named_parameters()}
    of[2].weight.requires_grad_(False)
    loss(of, 0).backward()
    rules.step(1e-1)
    for name, parameter in of.named_parameters():
        assert torch.equal(parameter, host.parameters[name])
        assert torch.equal(parameter, before[name]) == (name == "2.weight")


def test_what_crosses_the_bus_is_each_gradient_once_a_micro_batch_and_each_weight_once_a_step() -> None:
    of = model()
    host = on_host(of, sums=True)
    rules = UpdateRules({"adamw": AdamW(host.parameters)}, host.parameters, host)
    for seed in range(3):
        loss(of, seed).backward()
    rules.step(1e-2)
    num_parameters = sum(parameter.numel() for parameter in of.parameters())
    assert (host.bytes_to_host, host.bytes_to_device) == (3 * 2 * num_parameters, 2 * num_parameters)


def test_who_is_trained_no_longer_is_let_go_and_the_others_stay() -> None:
    of = model()
    host = on_host(of, sums=True)
    kept = host.parameters["0.weight"]
    host.set_parameters({"0.weight": of[0].weight, "0.bias": of[0].bias})
    assert host.parameters["0.weight"] is kept
    assert {name for name, _, _ in host.tensors()} == {"0.weight", "0.bias", None}
    loss(of, 0).backward()
    assert of[2].weight.grad is not None, "its gradient does not leave any more"
    assert of[0].weight.grad is None


@pytest.mark.parametrize(("sums", "width"), [(False, 2), (True, 4)])
def test_it_holds_a_copy_and_a_gradient_of_each_parameter(sums: bool, width: int) -> None:
    of = model()
    held = list(on_host(of, sums=sums).tensors())
    num_parameters, largest = sum(parameter.numel() for parameter in of.parameters()), 5 * 7
    of_kind = {
        kind: sum(tensor.untyped_storage().nbytes() for _, of_kind, tensor in held if of_kind == kind)
        for kind in (HOST_WEIGHTS, HOST_GRADIENTS)
    }
    landing = 2 * largest if sums else 0
    assert of_kind == {HOST_WEIGHTS: 2 * num_parameters, HOST_GRADIENTS: width * num_parameters + landing}


def test_delayed_updates_use_gradients_at_the_weights_before_the_previous_update() -> None:
    of, behind, ahead = model(torch.float32), model(torch.float32), model(torch.float32)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    host = on_host(of, sums=True)
    rules = UpdateRules({"adamw": AdamW(host.parameters, **settings)}, host.parameters, host, delays=True)
    reference = torch.optim.AdamW(ahead.parameters(), lr=0.05, **settings)  # has every update at once
    for seed in range(6):
        for used, expected in zip(of.parameters(), behind.parameters(), strict=True):
            torch.testing.assert_close(used, expected)
        loss(of, seed).backward()
        rules.step(0.05)
        rules.zero_grad()
        gradients = torch.autograd.grad(loss(behind, seed), list(behind.parameters()))
        behind.load_state_dict(ahead.state_dict())
        for parameter, gradient in zip(ahead.parameters(), gradients, strict=True):
            parameter.grad = gradient
        reference.step()
