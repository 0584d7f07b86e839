import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from steplm.cost.count import ByteCounter
from steplm.errors import CheckpointMismatch
from steplm.optim import adamw as module
from steplm.optim.adamw import AdamW, carry_state, clip_coefficient, decays
from steplm.optim.base import global_grad_norm

SHAPES = {"embed.weight": (9, 4), "a.weight": (4, 4), "a.bias": (4,), "b.weight": (3, 4), "norm.weight": (4,)}


def parameters(dtype=torch.float32, seed=0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def set_gradients(named: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in named.values():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def snapshot(optimizer: AdamW) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    tensors, steps = optimizer.state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}, steps


def torch_adamw(named: dict[str, nn.Parameter], weight_decay: float, **options) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in named.values() if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in named.values() if not decays(p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, **options)


@pytest.mark.parametrize("fused", [True, False])
def test_fp32_equals_torchs_adamw_over_20_steps(fused):
    ours, theirs = parameters(), parameters()
    optimizer, reference = AdamW(ours, weight_decay=0.1), torch_adamw(theirs, 0.1, fused=fused)
    for step in range(20):
        rate = 1e-2 / (1 + step)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(rate)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for name in ours:
        if fused:
            assert torch.equal(ours[name], theirs[name]), name
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_bf16_equals_an_fp32_run_whose_weights_are_rounded_for_the_forward():
    rounded = parameters(torch.bfloat16)
    exact = {name: nn.Parameter(p.detach().float()) for name, p in rounded.items()}
    optimizer, reference = AdamW(rounded, weight_decay=0.1), torch_adamw(exact, 0.1, fused=True)
    for step in range(20):
        for name in rounded:  # the gradient of sum(w**4) at the rounded weights
            weight = exact[name].detach().bfloat16()
            assert torch.equal(weight, rounded[name]), (step, name)
            rounded[name].grad = 4 * weight**3
            exact[name].grad = rounded[name].grad.float()
        optimizer.step(1e-3)
        for group in reference.param_groups:
            group["lr"] = 1e-3
        reference.step()
    for name, states in optimizer.state_tensors().items():
        assert torch.equal(states["master"], exact[name]), name


def test_small_updates_move_a_master_where_plain_bf16_stalls():
    plain = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    ours = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    reference = torch.optim.AdamW([plain], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = AdamW({"w": ours}, weight_decay=0.0)
    for _ in range(100):
        plain.grad, ours.grad = torch.ones_like(plain), torch.ones_like(ours)
        reference.step()
        optimizer.step(1e-4)
    assert torch.equal(plain, torch.ones_like(plain)), "1e-4 is below half the spacing of bf16 at 1"
    assert torch.equal(ours, torch.full_like(ours, 0.99))  # 100 steps of 1e-4, rounded
    torch.testing.assert_close(optimizer.state_tensors()["w"]["master"], torch.full((4, 4), 0.99))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_state_bytes_are_exact_and_there_before_the_first_step(dtype, expected):
    named = parameters(dtype)
    optimizer = AdamW(named)
    count = sum(parameter.numel() for parameter in named.values())
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for states in optimizer.state_tensors().values()
        for t in states.values()
    }
    assert sum(storages.values()) == expected * count
    set_gradients(named, 0)
    optimizer.step(1e-3)
    after = [t.data_ptr() for states in optimizer.state_tensors().values() for t in states.values()]
    assert after == list(storages), "steps allocate no further state"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_scale_equals_scaled_gradients_and_leaves_them_alone(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, reference = AdamW(ours), AdamW(theirs)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step, scale=1.0)
        before = {name: p.grad.clone() for name, p in ours.items()}
        optimizer.step(1e-2, grad_scale=0.25)
        for parameter in theirs.values():
            parameter.grad.mul_(0.25)  # a power of two: exact in bf16 as well
        reference.step(1e-2)
        assert all(torch.equal(p.grad, before[name]) for name, p in ours.items())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weight_decay_acts_on_matrices_only():
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(named, weight_decay=0.5).step(0.1)
    for name, parameter in named.items():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert not torch.equal(named["a.weight"], before["a.weight"])


def test_a_parameter_without_gradient_is_left_alone_and_keeps_its_step_count():
    named = parameters()
    optimizer = AdamW(named)
    set_gradients(named, 0)
    named["a.weight"].grad = None
    before = named["a.weight"].detach().clone()
    optimizer.step(1e-2)
    assert torch.equal(named["a.weight"], before)
    assert optimizer.steps == {name: int(name != "a.weight") for name in SHAPES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_state_continues_bit_for_bit(tmp_path, dtype):
    unbroken = parameters(dtype)
    optimizer = AdamW(unbroken)
    for step in range(3):
        set_gradients(unbroken, step)
        optimizer.step(1e-2)
    tensors, steps = optimizer.state_dict()
    save_file(tensors, tmp_path / "optimizer.safetensors")
    resumed = {key: nn.Parameter(p.detach().clone()) for key, p in unbroken.items()}
    second = AdamW(resumed)
    second.load_state_dict(load_file(tmp_path / "optimizer.safetensors"), steps)
    for step in range(3, 6):
        for named, each in ((unbroken, optimizer), (resumed, second)):
            set_gradients(named, step)
            each.step(1e-2)
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)
    ours, theirs = optimizer.state_dict(), second.state_dict()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert ours[1] == theirs[1] == dict.fromkeys(SHAPES, 6)


def test_loading_does_not_round_a_master_to_its_bf16_weight():
    named = parameters(torch.bfloat16)
    optimizer = AdamW(named)
    tensors, steps = snapshot(optimizer)
    tensors["a.weight.master"] += 1e-6
    optimizer.load_state_dict(tensors, steps)
    assert torch.equal(optimizer.state_tensors()["a.weight"]["master"], tensors["a.weight.master"])


def test_a_state_of_other_parameters_is_refused_by_name():
    optimizer = AdamW(parameters())
    tensors, steps = snapshot(optimizer)
    without = {name: t for name, t in tensors.items() if name != "a.bias.exp_avg"}
    with pytest.raises(CheckpointMismatch, match=r"missing: a\.bias\.exp_avg") as error:
        optimizer.load_state_dict(without, steps)
    assert error.value.missing == ["a.bias.exp_avg"]
    with pytest.raises(CheckpointMismatch, match=r"missing: a\.bias\.exp_avg"):
        optimizer.load_state_dict(without, steps, strict=False)  # half a parameter's state
    with pytest.raises(CheckpointMismatch, match=r"unknown: c\.weight, c\.weight\.exp_avg"):
        optimizer.load_state_dict({**tensors, "c.weight.exp_avg": torch.ones(1)}, {**steps, "c.weight": 1})
    with pytest.raises(CheckpointMismatch, match=r"another shape or dtype: a\.bias\.exp_avg"):
        optimizer.load_state_dict({**tensors, "a.bias.exp_avg": torch.ones(5)}, steps)
    with pytest.raises(CheckpointMismatch, match=r"missing: a\.bias"):
        optimizer.load_state_dict(tensors, {name: n for name, n in steps.items() if name != "a.bias"})
    with pytest.raises(CheckpointMismatch, match=r"missing: embed\.weight\.master, .* and 2 more"):
        AdamW(parameters(torch.bfloat16)).load_state_dict(tensors, steps)


def test_carried_state_follows_renamed_parameters_and_drops_the_rest():
    old_parameters = {
        name: nn.Parameter(torch.randn(2, 2)) for name in ("embed", "layers.0.w", "layers.1.w", "layers.0.w.lora_A")
    }
    old = AdamW(old_parameters)
    for step in range(4):
        set_gradients(old_parameters, step)
        old.step(1e-2)
    saved, _ = snapshot(old)
    # a growth: layer 1 becomes layer 2, layer 0 is frozen from now on, its adapter is fresh
    renamed = {"embed": "embed", "layers.0.w": "layers.0.w", "layers.1.w": "layers.2.w"}
    new_parameters = {
        "embed": old_parameters["embed"],
        "layers.0.w.lora_A": nn.Parameter(torch.randn(2, 2)),
        "layers.1.w": nn.Parameter(torch.randn(2, 2)),
        "layers.2.w": old_parameters["layers.1.w"],
    }
    new = AdamW(new_parameters)
    new.load_state_dict(*carry_state(*old.state_dict(), renamed), strict=False)
    tensors, steps = new.state_dict()
    assert steps == {"embed": 4, "layers.0.w.lora_A": 0, "layers.1.w": 0, "layers.2.w": 4}
    assert torch.equal(tensors["embed.exp_avg"], saved["embed.exp_avg"])
    assert torch.equal(tensors["layers.2.w.exp_avg_sq"], saved["layers.1.w.exp_avg_sq"])
    assert not tensors["layers.1.w.exp_avg"].any()
    assert not tensors["layers.0.w.lora_A.exp_avg"].any()


def test_a_new_parameter_begins_its_bias_correction_at_zero_while_others_go_on():
    kept, fresh = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    old = AdamW({"kept": kept}, weight_decay=0.0)
    for _ in range(50):
        kept.grad = torch.ones(2, 2)
        old.step(1e-2)
    new = AdamW({"kept": kept, "fresh": fresh}, weight_decay=0.0)
    new.load_state_dict(*old.state_dict(), strict=False)
    before = kept.detach().clone()
    kept.grad = fresh.grad = torch.ones(2, 2)
    new.step(1e-2)
    # under a constant gradient every bias-corrected Adam step is the learning rate
    torch.testing.assert_close(kept.detach() - before, torch.full((2, 2), -1e-2), rtol=1e-4, atol=0)
    torch.testing.assert_close(fresh.detach(), torch.full((2, 2), -1e-2), rtol=1e-4, atol=0)
    assert new.steps == {"kept": 51, "fresh": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "bytes_per_element"),
    [
        ({}, 4),
        ({"master_weights": False}, 9),
        ({"states": "8bit"}, 17),
        ({"states": "8bit", "master_weights": False}, 17),
    ],
)
@pytest.mark.parametrize("rows", [(8, 64, 8, 40, 30, 8), (1000,)])
def test_the_workspace_of_a_step_is_that_of_one_chunk(monkeypatch, rows, options, bytes_per_element, dtype):
    chunk = 64 * 64
    monkeypatch.setattr(module, "STEP_CHUNK", chunk)
    named = {f"w{index}": nn.Parameter(torch.ones(count, 64, dtype=dtype)) for index, count in enumerate(rows)}
    optimizer = AdamW(named, **options)
    set_gradients(named, 0)
    with ByteCounter() as counter:
        optimizer.step(1e-3, grad_scale=0.5)
    assert counter.peak_bytes <= bytes_per_element * chunk + 100, "beside it only scales and the kernel's step counts"
    if dtype == torch.bfloat16:
        assert counter.peak_bytes >= bytes_per_element * chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_grad_norm_of_large_gradients_is_right_to_five_digits(dtype):
    many = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3000, 700), (300, 300), (7,))]
    for index, parameter in enumerate(many):
        parameter.grad = torch.full_like(parameter, 0.03 * (index + 1))
    many.append(nn.Parameter(torch.ones(2)))  # without a gradient
    exact = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in many[:-1]))
    norm = global_grad_norm(many)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact, rel=1e-5)
    assert global_grad_norm([]).item() == 0.0


@pytest.mark.parametrize("shape", [(), (7,), (40, 30), (4, 5, 6)])
def test_the_norm_does_not_depend_on_the_chunk(monkeypatch, shape):
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = global_grad_norm([parameter])
    monkeypatch.setattr(module, "STEP_CHUNK", 64)
    assert torch.equal(global_grad_norm([parameter]), whole)
    torch.testing.assert_close(whole, parameter.grad.norm())


def test_clipping_brings_the_norm_to_its_limit_as_torch_does():
    ours, theirs = parameters(), list(parameters().values())
    set_gradients(ours, 0)
    for mine, other in zip(ours.values(), theirs, strict=True):
        other.grad = mine.grad.clone()
    norm = global_grad_norm(ours.values())
    assert torch.nn.utils.clip_grad_norm_(theirs, 0.5).item() == pytest.approx(norm.item(), rel=1e-6)
    factor = clip_coefficient(norm, 0.5)
    for mine, other in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(mine.grad * factor, other.grad)
    assert clip_coefficient(0.3, 0.5) == 1.0
    assert clip_coefficient(100.0, None) == 1.0
    assert math.isnan(clip_coefficient(float("nan"), 1.0)), "a NaN must not be hidden"


def test_zero_grad_frees_gradients():
    named = parameters()
    set_gradients(named, 0)
    AdamW(named.items()).zero_grad()
    assert all(parameter.grad is None for parameter in named.values())


def test_an_optimizer_of_nothing_steps():
    optimizer = AdamW({})
    optimizer.step(1e-3)
    assert optimizer.state_dict() == ({}, {})
