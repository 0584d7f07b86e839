"""GaLore, APOLLO and APOLLO-Mini."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from steplm.cost.count import ByteCounter
from steplm.cost.formats import low_rank_state_bytes, low_rank_step_bytes
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.optim.adamw import AdamW, carry_state
from steplm.optim.build import UpdateRules
from steplm.optim.low_rank import SCALES, LowRankAdamW
from steplm.optim.projection import leading_vectors, random_projector

METHODS = list(SCALES)
DTYPES = [torch.float32, torch.bfloat16]
MATRICES = {"layers.0.tall.weight": (24, 10), "layers.0.wide.weight": (10, 24), "layers.1.square.weight": (12, 12)}
OPTIONS = {"rank": 4, "update_proj_gap": 3}
NAME, WIDE = "layers.0.q.weight", (6, 9)


def parameters(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def set_gradients(named, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(named, optimizer, steps, rate=1e-2, grad_scale=1.0):
    for step in steps:
        torch.manual_seed(step)
        set_gradients(named, step)
        optimizer.step(rate, grad_scale)


def values(named):
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def one(method, shape=WIDE, dtype=torch.float32, **options):
    named = parameters({NAME: shape}, dtype)
    return named[NAME], LowRankAdamW(named, method=method, **{**OPTIONS, **options})


def adam(moments, gradient, step, betas, eps):
    """The formula of arXiv 1412.6980, algorithm 1, from the first step, which is 1."""
    first, second = moments
    first.mul_(betas[0]).add_((1 - betas[0]) * gradient)
    second.mul_(betas[1]).add_((1 - betas[1]) * gradient**2)
    return first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_galore_is_its_papers_algorithm_in_fp64(shape):
    rate, decay, betas, eps, scale = 0.05, 0.2, (0.8, 0.9), 1e-3, 0.7
    parameter, optimizer = one("galore", shape, betas=betas, eps=eps, weight_decay=decay, scale=scale)
    weight = parameter.detach().double().clone()
    is_wide = shape[0] <= shape[1]
    moments = [torch.zeros((4, max(shape)) if is_wide else (max(shape), 4), dtype=torch.float64) for _ in range(2)]
    for step in range(8):
        before = optimizer.state_tensors()[NAME]["projector"].clone()
        train({NAME: parameter}, optimizer, [step], rate, 0.5)
        projector = optimizer.state_tensors()[NAME]["projector"].double()
        gradient = 0.5 * parameter.grad.double()
        if step % 3 == 0:
            U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
            leading = U[:, :4] if is_wide else Vh[:4].T
            assert torch.allclose(projector @ projector.T, leading @ leading.T, atol=1e-5)
        else:
            assert torch.equal(projector.float(), before)
        projected = projector.T @ gradient if is_wide else gradient @ projector
        normal = adam(moments, projected, step + 1, betas, eps)
        update = scale * (projector @ normal if is_wide else normal @ projector.T)
        weight = weight - rate * decay * weight - rate * update
        assert torch.allclose(parameter.detach().double(), weight, atol=1e-5)


@pytest.mark.parametrize("method", ["apollo", "apollo_mini"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_apollo_is_its_papers_algorithm_in_fp64(shape, method):
    rate, decay, betas, eps, scale = 0.05, 0.2, (0.8, 0.9), 1e-3, 0.7
    options = {"betas": betas, "eps": eps, "weight_decay": decay, "scale": scale, "seed": 5}
    parameter, optimizer = one(method, shape, **options)
    weight = parameter.detach().double().clone()
    small, large = sorted(shape)
    rank = 1 if method == "apollo_mini" else 4
    moments = [torch.zeros(rank, large, dtype=torch.float64) for _ in range(2)]
    last, num_limited = None, 0
    for step in range(12):
        train({NAME: parameter}, optimizer, [step], rate, 0.5)
        gradient = 0.5 * parameter.grad.double()
        gradient = gradient if shape[0] <= shape[1] else gradient.T
        projector = random_projector(small, rank, f"5/{NAME}/{step // 3}", torch.device("cpu")).double()
        projected = projector.T @ gradient
        normal = adam(moments, projected, step + 1, betas, eps)
        if method == "apollo":
            factors = [normal[:, j].norm() / projected[:, j].norm() for j in range(large)]
            update = gradient @ torch.diag(torch.stack(factors))
        else:
            update = gradient * (normal.norm() / projected.norm())
        if last is not None and update.norm() > 1.01 * last:
            num_limited += 1
            update = update * (1.01 * last / update.norm())
        last = update.norm()
        update = scale * (update if shape[0] <= shape[1] else update.T)
        weight = weight - rate * decay * weight - rate * update
        assert torch.allclose(parameter.detach().double(), weight, atol=1e-5)
    assert 0 < num_limited < 11


def test_the_default_scales_are_the_papers():
    assert {method: one(method)[1].scale for method in METHODS} == {
        "galore": 0.25,
        "apollo": 1.0,
        "apollo_mini": math.sqrt(128),
    }


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_galore_agrees_with_another_implementation(shape):
    library = pytest.importorskip("pytorch_optimizer")
    parameter, optimizer = one("galore", shape, update_proj_gap=100, weight_decay=0.0, eps=0.0)
    other = nn.Parameter(parameter.detach().clone())
    group = {"params": [other], "rank": 4, "update_proj_gap": 100, "scale": 0.25, "projection_type": "std"}
    reference = library.GaLore([group], lr=0.02, betas=(0.9, 0.95), eps=0.0)
    for step in range(5):
        set_gradients({NAME: parameter}, step)
        other.grad = parameter.grad.clone()
        optimizer.step(0.02)
        reference.step()
    assert torch.allclose(parameter, other, atol=1e-6)


def test_with_unit_vectors_for_a_projector_galore_is_adamw_on_these_rows():
    parameter, optimizer = one("galore", update_proj_gap=100)
    rows = parameters({"rows": (4, 9)})
    rows["rows"].data.copy_(parameter.detach()[:4])
    adamw = AdamW(rows)
    rest = parameter.detach()[4:].clone()
    tensors = optimizer.state_dict()[0]
    tensors[f"{NAME}.projector"].copy_(torch.eye(6)[:, :4])
    # Step 1 renews nothing. Both have moments of zero, and begin as if after one gradient of zero.
    optimizer.load_state_dict(tensors, {NAME: 1})
    adamw.load_state_dict(adamw.state_dict()[0], {"rows": 1})
    optimizer.scale = 1.0
    for step in range(5):
        set_gradients({NAME: parameter}, step)
        rows["rows"].grad = parameter.grad[:4].clone()
        optimizer.step(0.01)
        adamw.step(0.01)
        rest.mul_(1 - 0.01 * 0.1)
    assert torch.allclose(parameter[:4], rows["rows"], rtol=0, atol=1e-6)
    assert torch.allclose(parameter[4:], rest, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(9,), (8, 9, 5), (1, 9), (9, 1)])
def test_what_is_no_matrix_with_both_sides_longer_than_the_rank_is_refused(method, shape):
    with pytest.raises(ConfigError, match=rf"{method} has states of rank \d.*leave it to AdamW"):
        LowRankAdamW(parameters({NAME: shape}), method=method, **OPTIONS)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("shape", [(4, 24), (24, 4)])
def test_a_side_as_long_as_the_rank_is_too_short(method, shape):
    with pytest.raises(ConfigError, match="leave it to AdamW"):
        one(method, shape)
    one(method, (5, 24))
    one("apollo_mini", shape)  # its rank is 1


@settings(max_examples=40, deadline=None)
@example("apollo_mini", (3, 17), 1, torch.bfloat16, False)
@given(
    method=st.sampled_from(METHODS),
    shape=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    rank=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    master_weights=st.booleans(),
)
def test_bytes_of_states_and_workspace_are_those_of_the_formulas(method, shape, rank, dtype, master_weights):
    assume(method == "apollo_mini" or min(shape) > rank)
    options = {"rank": rank, "update_proj_gap": 2, "master_weights": master_weights}
    parameter, optimizer = one(method, shape, dtype, **options)

    def held():
        return {key: (t.data_ptr(), t.untyped_storage().nbytes()) for key, t in optimizer.state_dict()[0].items()}

    before = held()
    has_copy = dtype == torch.bfloat16 and master_weights
    master_bytes = 4 * parameter.numel() if has_copy else 0
    expected = low_rank_state_bytes(method, *shape, rank) + master_bytes
    assert sum(num_bytes for _, num_bytes in before.values()) == expected
    set_gradients({NAME: parameter}, 0)
    with ByteCounter() as counter:
        for _ in range(3):
            optimizer.step(1e-2, 0.5)
    workspace = low_rank_step_bytes(method, *shape, rank, width=dtype.itemsize, has_master=has_copy)
    assert workspace - 16 <= counter.peak_bytes <= workspace
    assert counter.current_bytes == 0
    assert held() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit(tmp_path, method, precision):
    dtype, master_weights = precision

    def build(seed=0):
        named = parameters(MATRICES, dtype, seed)
        return named, LowRankAdamW(named, method=method, master_weights=master_weights, **OPTIONS)

    whole, optimizer = build()
    train(whole, optimizer, range(8))
    for stop in range(8):  # projectors are renewed at 0, 3 and 6
        first, stopped = build()
        train(first, stopped, range(stop))
        tensors, steps = stopped.state_dict()
        save_file({**tensors, **{f"weights/{name}": p.detach() for name, p in first.items()}}, tmp_path / "state")
        saved = load_file(tmp_path / "state")
        second, resumed = build(seed=1)
        for name, parameter in second.items():
            parameter.data.copy_(saved.pop(f"weights/{name}"))
        resumed.load_state_dict(saved, steps)
        train(second, resumed, range(stop, 8))
        assert equal(values(whole), values(second)), stop
        assert equal(optimizer.state_dict()[0], resumed.state_dict()[0]), stop


def test_states_of_another_rank_or_method_are_refused():
    tensors, steps = one("galore")[1].state_dict()
    with pytest.raises(CheckpointMismatch):
        one("galore", rank=3)[1].load_state_dict(tensors, steps)
    with pytest.raises(CheckpointMismatch):
        one("apollo")[1].load_state_dict(tensors, steps)


@pytest.mark.parametrize("method", METHODS)
def test_states_follow_a_matrix_to_its_name_after_a_growth(method):
    parameter, optimizer = one(method)
    train({NAME: parameter}, optimizer, range(4))
    renamed = "layers.5.q.weight"
    grown = LowRankAdamW(parameters({renamed: WIDE}), method=method, **OPTIONS)
    grown.load_state_dict(*carry_state(*optimizer.state_dict(), {NAME: renamed}), strict=False)
    assert equal(grown.state_tensors()[renamed], optimizer.state_tensors()[NAME])
    assert grown.steps == {renamed: 4}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden @ self.embed.weight.T


def small_rules(model, method, **options):
    """As training has them: the layers' matrices by this method, everything else by AdamW."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if name.startswith("layers.") and p.ndim == 2}
    rest = {name: p for name, p in named.items() if name not in matrices}
    low_rank = LowRankAdamW(matrices, method=method, **{**OPTIONS, **options})
    return UpdateRules({"adamw": AdamW(rest), method: low_rank}, named)


def small_loss(model, step):
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_inside_the_backward_pass_equals_the_one_after_it(method, dtype):
    def build():
        torch.manual_seed(0)
        model = Small().to(dtype)
        return model, small_rules(model, method)

    (model, optimizer), (reference, stepping) = build(), build()
    for step in range(5):
        with optimizer.in_backward(1e-2):
            small_loss(model, step).backward()
        small_loss(reference, step).backward()
        stepping.step(1e-2)
        stepping.zero_grad()
    assert equal(model.state_dict(), reference.state_dict())
    assert equal(optimizer.state_dict()[0], stepping.state_dict()[0])
    assert set(optimizer.steps.values()) == {5}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_falls(method):
    torch.manual_seed(0)
    model = Small()
    optimizer = small_rules(model, method, update_proj_gap=10)
    first = small_loss(model, 0).item()
    for _ in range(60):
        with optimizer.in_backward(1e-2):
            small_loss(model, 0).backward()
    assert small_loss(model, 0).item() < 0.6 * first


@pytest.mark.parametrize("method", METHODS)
def test_bf16_weights_are_the_rounded_masters_of_an_fp32_run(method):
    named, exact = parameters(MATRICES, torch.bfloat16), parameters(MATRICES)
    optimizer = LowRankAdamW(named, method=method, **OPTIONS)
    for name, parameter in exact.items():
        parameter.data.copy_(named[name].detach())
    reference = LowRankAdamW(exact, method=method, **OPTIONS)
    for step in range(5):
        set_gradients(named, step)
        for name, parameter in exact.items():
            parameter.grad = named[name].grad.float()
        optimizer.step(1e-3)
        reference.step(1e-3)
    assert equal({name: held["master"] for name, held in optimizer.state_tensors().items()}, values(exact))
    assert equal(values(named), {name: weight.bfloat16() for name, weight in values(exact).items()})


@pytest.mark.parametrize("method", METHODS)
def test_without_masters_the_rounding_is_right_in_the_mean(method):
    def update(seed, dtype):
        named = parameters(MATRICES, torch.bfloat16)
        named = {name: nn.Parameter(parameter.detach().to(dtype)) for name, parameter in named.items()}
        before = values(named)
        optimizer = LowRankAdamW(named, method=method, master_weights=False, **OPTIONS)
        set_gradients(named, 0)
        for parameter in named.values():
            parameter.grad = parameter.grad.bfloat16().to(dtype)
        torch.manual_seed(seed)
        optimizer.step(1e-4)
        return torch.cat([(named[name].detach().double() - before[name].double()).flatten() for name in named])

    exact = update(0, torch.float32)
    draws = torch.stack([update(seed, torch.bfloat16) for seed in range(100)])
    assert torch.equal(draws[0], update(0, torch.bfloat16))
    # Of one weight a draw errs by at most 2 ** -7; the sum over 620 weights and 100 draws by a fraction of that.
    assert (draws.mean(0) * exact.sign()).sum().item() == pytest.approx(exact.abs().sum().item(), rel=0.25)


def gradients_of_all_kinds(shape):
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(shape, generator=generator)
    small = min(shape)
    u, _, v = torch.linalg.svd(usual, full_matrices=False)
    return {
        "usual": usual,
        "of rank 1": torch.outer(usual[:, 0], usual[0]),
        "ill-conditioned": (u * torch.logspace(0, -12, small)) @ v,
        "huge": usual * 1e18,
        "tiny": usual * 1e-18,
        "one element": torch.zeros(shape).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0)),
        "a column": torch.zeros(shape).index_fill(1, torch.tensor([2]), 1.0),
        "equal": torch.ones(shape),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", list(gradients_of_all_kinds((4, 5))))
def test_every_matrix_moves_and_stays_finite_on_every_gradient(method, kind):
    for (name, shape), dtype in itertools.product(MATRICES.items(), DTYPES):
        named = parameters({name: shape}, dtype)
        before = values(named)
        optimizer = LowRankAdamW(named, method=method, weight_decay=0.0, eps=1e-30, **OPTIONS)
        for _ in range(7):
            named[name].grad = gradients_of_all_kinds(shape)[kind].to(dtype)
            optimizer.step(1e-1)
        assert named[name].isfinite().all()
        assert not torch.equal(named[name], before[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zeros", [{0}, {0, 1, 2, 3, 4}, {3}, {4}])
def test_a_gradient_of_zero_stops_no_matrix_for_good(method, zeros):
    parameter, optimizer = one(method, weight_decay=0.0)
    for step in range(8):
        before = parameter.detach().clone()
        set_gradients({NAME: parameter}, step)
        if step in zeros:
            parameter.grad.zero_()
        optimizer.step(1e-2)
        assert parameter.isfinite().all()
        moved = (parameter - before).abs().max()
        assert moved > 1e-4 if step not in zeros else method == "galore" or moved == 0


def test_galore_waits_for_a_gradient_to_make_its_first_projector():
    parameter, optimizer = one("galore")
    before = parameter.detach().clone()
    for _ in range(2):
        parameter.grad = torch.zeros(WIDE)
        optimizer.step(1e-2)
    assert optimizer.steps == {NAME: 0}
    assert torch.equal(parameter, before)
    set_gradients({NAME: parameter}, 0)
    optimizer.step(1e-2)
    projector = optimizer.state_tensors()[NAME]["projector"]
    assert torch.equal(projector, leading_vectors(parameter.grad, 4).float())
    assert optimizer.steps == {NAME: 1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_gradient_with_nan_is_told_by_the_norm_and_decomposes_nothing(method, step):
    parameter, optimizer = one(method)
    train({NAME: parameter}, optimizer, range(step))
    projector = optimizer.state_tensors()[NAME].get("projector", torch.zeros(1)).clone()
    bad = torch.ones(WIDE)
    bad[0, 0] = float("nan")
    with optimizer.in_backward(1e-2) as norm:
        (parameter * bad).sum().backward()
    assert norm.total().isnan()
    assert torch.equal(optimizer.state_tensors()[NAME].get("projector", torch.zeros(1)), projector)


def test_apollos_update_grows_by_one_percent_at_most():
    def update_norms(limited):
        parameter, optimizer = one("apollo", weight_decay=0.0, update_proj_gap=100)
        norms = []
        for step in range(6):
            before = parameter.detach().double().clone()
            parameter.grad = torch.full(WIDE, -1.0 if step == 1 else 1.0)
            optimizer.step(1.0)
            norms.append((parameter.detach().double() - before).norm().item())
            if not limited:
                optimizer.state_tensors()[NAME]["update_norm"].zero_()
        return norms

    free, limited = update_norms(False), update_norms(True)
    assert free[2] > 5 * free[1]
    assert limited[:2] == free[:2]
    assert [after / before for before, after in itertools.pairwise(limited[1:])] == pytest.approx([1.01] * 4, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_gradient_is_a_gradient_times_the_scale(method, dtype):
    (first, optimizer), (second, reference) = one(method, dtype=dtype), one(method, dtype=dtype)
    for step in range(5):
        set_gradients({NAME: first}, step)
        second.grad = first.grad * 0.25  # exact
        optimizer.step(1e-2, 0.25)
        reference.step(1e-2)
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_fake_tensors_can_be_stepped(method):
    with FakeTensorMode(), ByteCounter() as counter:
        named = {NAME: nn.Parameter(torch.full((6, 9), 0.1, dtype=torch.bfloat16))}
        optimizer = LowRankAdamW(named, method=method, **OPTIONS)
        named[NAME].grad = torch.full((6, 9), 0.1, dtype=torch.bfloat16)
        before = counter.current_bytes
        counter.reset_peak()
        for _ in range(2):
            optimizer.step(1e-2, 0.5)
        workspace = low_rank_step_bytes(method, 6, 9, 4, width=2, has_master=True)
        assert workspace - 16 <= counter.peak_bytes - before <= workspace


@pytest.mark.parametrize("seed", [0, 1])
def test_apollos_projectors_depend_on_seed_and_name_and_on_no_other_random_number(seed):
    def run(name, seed, noise):
        named = parameters({name: WIDE})
        optimizer = LowRankAdamW(named, method="apollo", seed=seed, **OPTIONS)
        for step in range(4):
            torch.manual_seed(noise + step)
            set_gradients(named, step)
            optimizer.step(1e-2)
        return named[name].detach()

    assert torch.equal(run(NAME, seed, 0), run(NAME, seed, 99))
    assert not torch.equal(run(NAME, seed, 0), run(NAME, seed + 1, 0))
    assert not torch.equal(run(NAME, seed, 0), run("layers.0.k.weight", seed, 0))


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="galore, apollo, apollo_mini"):
        one("golore")
