"""AdamW with 8-bit moments, with 8-bit master weights or none, in pieces."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from steplm.cost.count import ByteCounter
from steplm.cost.formats import STATE_BLOCK, state_bytes, step_bytes
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.optim import adamw as module
from steplm.optim.adamw import AdamW, carry_state
from steplm.optim.masters import correct

SHAPES = {"embed": (70, 16), "a": (64, 64), "bias": (64,), "short": (3, 5), "norm": (16,)}
OPTIONS = [
    {"states": states, "master_weights": master_weights}
    for states, master_weights in itertools.product(("fp32", "8bit"), (True, False, "8bit"))
]


def parameters(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def set_gradients(named, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(named, optimizer, steps, rate=1e-2):
    for step in steps:
        torch.manual_seed(step)
        set_gradients(named, step)
        optimizer.step(rate, grad_scale=0.5)


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_state_bytes_are_those_of_the_formula_and_no_step_adds_any(options, dtype):
    named = parameters(dtype)
    optimizer = AdamW(named, **options)

    def held():
        tensors = [t for states in optimizer.state_tensors().values() for t in states.values()]
        return {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    before = held()
    expected = 0
    for parameter in named.values():
        quantized = options["states"] == "8bit" and parameter.ndim >= 2
        expected += 2 * (state_bytes(parameter.numel()) if quantized else 4 * parameter.numel())
        if dtype == torch.bfloat16:
            expected += {True: 4, "8bit": 1, False: 0}[options["master_weights"]] * parameter.numel()
    assert sum(before.values()) == expected
    train(named, optimizer, range(2))
    assert held() == before


def test_states_by_name_and_format():
    states = AdamW(parameters(), states="8bit").state_tensors()
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in states["embed"].items()} == {
        "exp_avg": (torch.uint8, (70, 16)),
        "exp_avg_scale": (torch.float32, (5,)),  # 1120 elements
        "exp_avg_sq": (torch.uint8, (70, 16)),
        "exp_avg_sq_scale": (torch.float32, (5,)),
        "master": (torch.float32, (70, 16)),
    }
    assert list(states["bias"]) == ["exp_avg", "exp_avg_sq", "master"]
    assert states["bias"]["exp_avg"].dtype == torch.float32
    assert list(AdamW(parameters(), master_weights=False).state_tensors()["a"]) == ["exp_avg", "exp_avg_sq"]
    with pytest.raises(ConfigError, match=r"'4bit'. Known: fp32, 8bit"):
        AdamW({}, states="4bit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_pieces_and_buckets_change_no_bit(monkeypatch, states, dtype):
    whole, pieces = parameters(dtype), parameters(dtype)
    first = AdamW(whole, states=states)
    monkeypatch.setattr(module, "STEP_CHUNK", 2 * STATE_BLOCK)
    second = AdamW(pieces, states=states)
    assert len(second._buckets) > len(SHAPES) > len(first._buckets)
    for named, optimizer in ((whole, first), (pieces, second)):
        train(named, optimizer, range(5))
    assert equal(whole, pieces)
    assert equal(first.state_dict()[0], second.state_dict()[0])
    assert first.steps == second.steps == dict.fromkeys(SHAPES, 5)


def test_8bit_equals_adamw_on_moments_that_are_rounded_between_steps():
    """The plain optimizer, whose moments are taken through the codes after every step."""
    ours, theirs = parameters(), parameters()
    optimizer, reference = AdamW(ours, states="8bit"), AdamW(theirs)
    for step in range(8):
        train(ours, optimizer, [step])
        train(theirs, reference, [step])
        for name, states in reference.state_tensors().items():
            if theirs[name].ndim == 2:
                for key in ("exp_avg", "exp_avg_sq"):
                    book = optimizer._books[key == "exp_avg", torch.device("cpu")]
                    states[key].copy_(book.dequantize(*book.quantize(states[key].flatten())).view_as(states[key]))
    assert equal(ours, theirs)
    assert all(
        torch.equal(optimizer.state_tensors()[n]["master"], reference.state_tensors()[n]["master"]) for n in ours
    )


def test_8bit_equals_the_8bit_adamw_of_torchao(monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 64 * 64).view(64, 64)) for _ in range(2))
    optimizer = AdamW({"w": ours}, states="8bit", weight_decay=0.1)
    reference = AdamW8bit([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, block_size=256)
    for _ in range(5):
        gradient = torch.randn(64, 64)
        gradient += 0.1 * gradient.sign()  # torchao gives up second moments near 0
        ours.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step(1e-2)
        reference.step()
    difference = (ours - theirs).detach().abs()
    assert difference.median() < 1e-6
    assert (difference > 1e-5).float().mean() < 0.01, "a sum rounded otherwise meets the other of two near codes"
    assert difference.max() < 1e-2


def test_an_outlier_in_a_block_does_not_make_its_neighbors_leap():
    # Beside a gradient of 1 a second moment of (1e-5)**2 is below the smallest code, the first moment is not.
    weight = nn.Parameter(torch.zeros(1, STATE_BLOCK))
    optimizer = AdamW({"w": weight}, states="8bit", weight_decay=0.0)
    gradient = torch.full((1, STATE_BLOCK), 1e-5)
    gradient[0, 0] = 1.0
    for gradients in (gradient, torch.zeros_like(gradient)):
        weight.grad = gradients
        optimizer.step(1.0)
    assert weight.detach().abs().max() < 3.0, "of the order of the learning rate"


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_fits_a_linear_map_nearly_as_well_as_fp32_states(options):
    def final_loss(**options):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(32, 32, generator=generator)
        weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.bfloat16))
        optimizer = AdamW({"w": weight}, weight_decay=0.0, **options)
        torch.manual_seed(0)
        for step in range(300):
            inputs = torch.randn(64, 32, generator=generator)
            loss = (inputs @ (weight.float() - target).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(2e-2 * (1 - step / 300))
        return (weight.detach().float() - target).square().mean().item()

    assert final_loss(**options) < 1e-3 + 2 * final_loss(), "it begins at 1"


def test_small_updates_move_bf16_weights_without_masters_where_plain_rounding_stalls():
    plain, ours = (nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    reference = torch.optim.AdamW([plain], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = AdamW({"w": ours}, weight_decay=0.0, master_weights=False)
    torch.manual_seed(0)
    for _ in range(100):
        plain.grad, ours.grad = torch.ones_like(plain), torch.ones_like(ours)
        reference.step()
        optimizer.step(1e-4)
    assert torch.equal(plain, torch.ones_like(plain)), "1e-4 is below half the spacing of bf16 at 1"
    assert ours.detach().float().mean().item() == pytest.approx(0.99, abs=2e-4)  # 100 steps of 1e-4


def test_without_masters_a_seed_decides_every_bit_and_another_seed_other_ones():
    def run(seed):
        named = parameters()
        optimizer = AdamW(named, master_weights=False, states="8bit")
        train(named, optimizer, range(seed, seed + 3), rate=1e-4)
        return named

    assert equal(run(0), run(0))
    assert not equal(run(0), run(5))


def test_fp32_parameters_draw_no_bits():
    first, second = parameters(torch.float32), parameters(torch.float32)
    one, two = AdamW(first, master_weights=False), AdamW(second)
    for named, optimizer in ((first, one), (second, two)):
        train(named, optimizer, range(3))
    assert equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_saved_and_loaded_states_continue_bit_for_bit(tmp_path, options, dtype):
    unbroken = parameters(dtype)
    optimizer = AdamW(unbroken, **options)
    train(unbroken, optimizer, range(3))
    tensors, steps = optimizer.state_dict()
    save_file(tensors, tmp_path / "optimizer.safetensors")
    resumed = {key: nn.Parameter(p.detach().clone()) for key, p in unbroken.items()}
    second = AdamW(resumed, **options)
    second.load_state_dict(load_file(tmp_path / "optimizer.safetensors"), steps)
    assert equal(optimizer.state_dict()[0], second.state_dict()[0])
    for named, each in ((unbroken, optimizer), (resumed, second)):
        train(named, each, range(3, 6))
    assert equal(unbroken, resumed)
    assert equal(optimizer.state_dict()[0], second.state_dict()[0])


def test_states_of_another_format_are_refused():
    tensors, steps = AdamW(parameters()).state_dict()
    with pytest.raises(CheckpointMismatch, match=r"missing: embed\.exp_avg_scale.*of another shape or dtype: embed"):
        AdamW(parameters(), states="8bit").load_state_dict(tensors, steps)
    with pytest.raises(CheckpointMismatch, match=r"unknown: embed\.master"):
        AdamW(parameters(), master_weights=False).load_state_dict(tensors, steps)


def test_scales_are_carried_through_a_growth():
    named = {"layers.1.w": nn.Parameter(torch.randn(64, 64))}
    old = AdamW(named, states="8bit")
    train(named, old, range(2))
    new = AdamW({"layers.2.w": named["layers.1.w"], "layers.1.w": nn.Parameter(torch.ones(4, 4))}, states="8bit")
    new.load_state_dict(*carry_state(*old.state_dict(), {"layers.1.w": "layers.2.w"}), strict=False)
    assert new.steps == {"layers.2.w": 2, "layers.1.w": 0}
    before, after = old.state_tensors()["layers.1.w"], new.state_tensors()["layers.2.w"]
    assert before["exp_avg_sq_scale"].all()
    assert equal(before, after)
    assert not any(tensor.any() for tensor in new.state_tensors()["layers.1.w"].values())


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_bytes_with_8_bit_masters_are_those_of_the_formulas(states):
    named = parameters()
    optimizer = AdamW(named, states=states, master_weights="8bit")
    assert all(held["correction"].nbytes == named[name].numel() for name, held in optimizer.state_tensors().items())
    set_gradients(named, 0)
    with ByteCounter() as counter:
        optimizer.step(1e-2, grad_scale=0.5)
    buckets = [[named[name].numel() for name in named if named[name].ndim == n] for n in (1, 2)]
    expected = max(step_bytes(sum(b), max(b), states=states, masters="8bit") for b in buckets)
    assert expected <= counter.peak_bytes <= expected + 4 * len(named)  # the counts of steps


def test_over_a_thousand_steps_8_bit_masters_stay_with_fp32_ones_where_bf16_alone_does_not():
    def final(master_weights):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(16, 24, generator=generator)
        weight = nn.Parameter(torch.randn(16, 24, generator=generator).bfloat16())
        optimizer = AdamW({"w": weight}, master_weights=master_weights)
        torch.manual_seed(0)

        def held():
            states = optimizer.state_tensors()["w"]
            if "correction" in states:
                return correct(weight.detach(), states["correction"])
            return states.get("master", weight.detach()).float()

        for step in range(1000):
            inputs = torch.randn(32, 24, generator=generator)
            weight.grad = ((inputs @ (held() - target).T).T @ inputs / 32).bfloat16()
            optimizer.step(1e-2 * (1 - step / 1000))
        return held()

    exact = final(True)
    kept, alone = ((final(masters) - exact).square().mean().sqrt() for masters in ("8bit", False))
    assert kept < 3e-4 < 3e-3 < alone
