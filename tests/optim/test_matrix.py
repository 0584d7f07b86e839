"""What every rule for whole matrices does: bytes, pieces, checkpoints, the fused backward pass, bf16 weights."""

import itertools
from functools import partial
from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from steplm.cost import formats
from steplm.cost.count import ByteCounter
from steplm.cost.formats import (
    SIGNED_CODE_BOOK_BYTES,
    STATE_BLOCK,
    momentum_bytes,
    muon_step_bytes,
    row_pieces,
    scale_step_bytes,
)
from steplm.errors import CheckpointMismatch, ConfigError, SteplmError
from steplm.optim.adamw import carry_state
from steplm.optim.base import global_grad_norm
from steplm.optim.matrix import MASTER_WEIGHTS, STATES
from steplm.optim.muon import Muon
from steplm.optim.scale import SCALE

RULES = {"muon": Muon, "scale": SCALE, "scale_momentum": partial(SCALE, momentum=0.9)}
STATE_BYTES = {
    "muon": momentum_bytes,
    "scale": lambda rows, columns, states: 0,
    "scale_momentum": momentum_bytes,
}
STEP_BYTES = {
    "muon": partial(muon_step_bytes, compute_width=4),
    "scale": scale_step_bytes,
    "scale_momentum": partial(scale_step_bytes, momentum=True),
}
SHAPES = {"tall": (40, 17), "wide": (17, 40), "q": (24, 24), "k": (24, 24), "experts": (3, 20, 30)}
DTYPES = [torch.float32, torch.bfloat16]

each_rule = pytest.mark.parametrize("rule", RULES)


def parameters(dtype=torch.bfloat16, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def set_gradients(named, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(named, rule, steps, rate=1e-2, grad_scale=1.0):
    for step in steps:
        torch.manual_seed(step)
        set_gradients(named, step)
        rule.step(rate, grad_scale)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def copies(named, dtype=None):
    return {name: nn.Parameter(parameter.detach().to(dtype, copy=True)) for name, parameter in named.items()}


def masters_of(dtype, master_weights):
    if dtype == torch.float32 or master_weights is True:
        return "fp32"
    return master_weights or "none"


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    shapes=st.lists(
        st.sampled_from([(3, 17), (17, 3), (32, 32), (2, 9, 12), (5, 300), (1, 1)]), min_size=1, max_size=5
    ),
    states=st.sampled_from(STATES),
    master_weights=st.sampled_from(MASTER_WEIGHTS),
    dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([512, 2**22]),
)
def test_bytes_of_states_and_workspace_are_those_of_the_formulas(rule, shapes, states, master_weights, dtype, chunk):
    maps = [shape[-2:] for shape in shapes for _ in range(prod(shape[:-2]))]
    masters = masters_of(dtype, master_weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "STEP_CHUNK", chunk)
        named = parameters(dtype, shapes=dict(enumerate(shapes)))
        named = {str(name): parameter for name, parameter in named.items()}
        optimizer = RULES[rule](named, states=states, master_weights=master_weights)

        def held():
            return {key: (t.data_ptr(), t.untyped_storage().nbytes()) for key, t in optimizer.state_dict()[0].items()}

        before = held()
        beside = {"fp32": 4 * (dtype == torch.bfloat16), "8bit": 1, "none": 0}[masters]
        expected = sum(STATE_BYTES[rule](*shape, states) + beside * prod(shape) for shape in maps)
        assert sum(num_bytes for _, num_bytes in before.values()) == expected
        set_gradients(named, 0)
        with ByteCounter() as counter:
            optimizer.step(1e-2, 0.5)
        assert counter.peak_bytes == STEP_BYTES[rule](maps, states=states, masters=masters)
        assert counter.current_bytes == 0
        assert held() == before


@each_rule
def test_the_tables_of_8_bit_states_have_the_bytes_of_the_formula_before_the_first_step(rule):
    optimizer = RULES[rule](parameters(), states="8bit")
    expected = 0 if rule == "scale" else SIGNED_CODE_BOOK_BYTES
    assert sum(table.untyped_storage().nbytes() for table in optimizer.tables()) == expected


@given(rows=st.integers(1, 3000), columns=st.integers(1, 70000), chunk=st.sampled_from([1, 256, 2**14, 2**22]))
def test_pieces_cover_all_rows_once_and_begin_with_a_block(rows, columns, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "STEP_CHUNK", chunk)
        pieces = row_pieces(rows, columns)
    assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
    assert all(piece.start * columns % STATE_BLOCK == 0 for piece in pieces)
    assert all((piece.stop - piece.start) * columns <= max(chunk, STATE_BLOCK * columns) for piece in pieces)


@each_rule
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("master_weights", [True, "8bit"])
def test_pieces_change_no_bit_and_batches_hardly_any(monkeypatch, rule, states, master_weights):
    options = {"states": states, "master_weights": master_weights}
    shapes = {"tall": (70, 64), "wide": (90, 300), "experts": (2, 40, 24)}
    whole, cut = parameters(shapes=shapes), parameters(shapes=shapes)
    optimizers = [RULES[rule](named, **options) for named in (whole, cut)]
    train(whole, optimizers[0], range(3))
    monkeypatch.setattr(formats, "STEP_CHUNK", 2 * STATE_BLOCK)
    assert all(len(row_pieces(*shape[-2:])) > 1 for shape in shapes.values())
    train(cut, optimizers[1], range(3))
    for name in ("tall", "wide"):
        assert torch.equal(whole[name], cut[name])
        states_of = [optimizer.state_tensors()[name] for optimizer in optimizers]
        assert equal(*states_of)
    torch.testing.assert_close(whole["experts"], cut["experts"])  # products of one matrix or of two


@each_rule
@pytest.mark.parametrize(("states", "master_weights"), itertools.product(STATES, MASTER_WEIGHTS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path, rule, states, master_weights, dtype):
    named = parameters(dtype)
    optimizer = RULES[rule](named, states=states, master_weights=master_weights)
    train(named, optimizer, range(2))
    tensors, steps = optimizer.state_dict()
    save_file(tensors, tmp_path / "states.safetensors")
    resumed = copies(named)
    second = RULES[rule](resumed, states=states, master_weights=master_weights)
    second.load_state_dict(load_file(tmp_path / "states.safetensors"), steps)
    train(named, optimizer, range(2, 4))
    train(resumed, second, range(2, 4))
    assert equal(named, resumed)
    assert equal(optimizer.state_dict()[0], second.state_dict()[0])
    assert optimizer.steps == second.steps == dict.fromkeys(SHAPES, 4)


@each_rule
def test_states_of_another_format_or_of_other_parameters_are_refused(rule):
    def load(shapes=SHAPES, **options):
        saved = RULES[rule](parameters(), states="8bit").state_dict()
        RULES[rule](parameters(shapes=shapes), **options).load_state_dict(*saved)

    load(states="8bit")
    with pytest.raises(CheckpointMismatch, match=r"unknown: tall.master"):
        load(states="8bit", master_weights=False)
    with pytest.raises(CheckpointMismatch, match=r"missing: tall.correction.*unknown: tall.master"):
        load(states="8bit", master_weights="8bit")
    with pytest.raises(CheckpointMismatch, match=r"missing: new, new\."):
        load({**SHAPES, "new": (3, 3)}, states="8bit")
    with pytest.raises(CheckpointMismatch, match=r"of another shape or dtype: .*tall.master"):
        load({**SHAPES, "tall": (8, 85)}, states="8bit")


@each_rule
def test_states_follow_a_matrix_to_its_name_after_a_growth(rule):
    named = parameters()
    optimizer = RULES[rule](named, states="8bit", master_weights="8bit")
    train(named, optimizer, range(2))
    renamed = {"grown": named["experts"], "fresh": named["q"]}
    grown = RULES[rule](renamed, states="8bit", master_weights="8bit")
    grown.load_state_dict(*carry_state(*optimizer.state_dict(), {"experts": "grown"}), strict=False)
    assert equal(grown.state_tensors()["grown"], optimizer.state_tensors()["experts"])
    assert not any(tensor.any() for tensor in grown.state_tensors()["fresh"].values())
    assert grown.steps == {"grown": 2, "fresh": 0}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(8, 24, generator=generator).to(model.layers[0].weight.dtype) for _ in range(2))
    return nn.functional.mse_loss(model(inputs), targets)


def build(rule, dtype, **options):
    torch.manual_seed(0)
    model = Residual().to(dtype)
    return model, RULES[rule](model.named_parameters(), **options)


@each_rule
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_inside_the_backward_pass_is_that_of_a_step(monkeypatch, rule, dtype):
    monkeypatch.setattr(formats, "STEP_CHUNK", 24 * 24)  # one map at once in both: then no bit differs
    (model, optimizer), (reference, stepping) = (build(rule, dtype, states="8bit") for _ in range(2))
    for step in range(3):
        with optimizer.in_backward(1e-2) as norm:
            loss_of(model, step).backward()
        loss_of(reference, step).backward()
        assert norm.total().item() == pytest.approx(global_grad_norm(reference.parameters()).item(), rel=1e-6)
        stepping.step(1e-2)
        stepping.zero_grad()
    assert equal(model.state_dict(), reference.state_dict())
    assert equal(optimizer.state_dict()[0], stepping.state_dict()[0])
    assert set(optimizer.steps.values()) == set(stepping.steps.values()) == {3}
    assert all(parameter.grad is None for parameter in (*model.parameters(), *reference.parameters()))


@each_rule
def test_a_measurement_updates_nothing_and_a_second_backward_pass_is_refused(rule):
    model, optimizer = build(rule, torch.float32)
    before = copies(dict(model.named_parameters()))
    with optimizer.in_backward(None) as norm:
        loss_of(model, 0).backward()
    assert norm.total() > 0
    assert equal(dict(model.named_parameters()), before)
    assert set(optimizer.steps.values()) == {0}
    with optimizer.in_backward(1e-2):
        loss_of(model, 0).backward()
        with pytest.raises(SteplmError, match=r"layers\.2\.weight arrived twice"):
            loss_of(model, 1).backward()
    loss_of(model, 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "no hook is left"


@each_rule
@pytest.mark.parametrize("states", STATES)
def test_bf16_weights_are_the_rounded_masters_of_an_fp32_run(rule, states):
    named = parameters()
    exact = copies(named, torch.float32)
    optimizer, reference = RULES[rule](named, states=states), RULES[rule](exact, states=states)
    for step in range(3):
        set_gradients(named, step)
        for name, parameter in exact.items():
            parameter.grad = named[name].grad.float()
        optimizer.step(1e-3, 0.5)
        reference.step(1e-3, 0.5)
    assert equal({name: held["master"] for name, held in optimizer.state_tensors().items()}, copies(exact))
    assert equal(named, copies(exact, torch.bfloat16))


@each_rule
def test_without_masters_the_rounding_is_right_in_the_mean_and_a_seed_decides_it(rule):
    def update(seed, dtype):
        named = copies(parameters(), dtype)
        before = copies(named)
        optimizer = RULES[rule](named, master_weights=False)
        train(named, optimizer, [0], rate=0.0)  # the same gradients for both: those of bf16
        set_gradients(parameters(), 0)
        for parameter, source in zip(named.values(), parameters().values(), strict=True):
            parameter.grad = source.detach().to(dtype)
        torch.manual_seed(seed)
        optimizer.step(1e-3)
        return torch.cat([(named[name].detach().double() - before[name].double()).flatten() for name in named])

    exact = update(0, torch.float32)
    draws = torch.stack([update(seed, torch.bfloat16) for seed in range(50)])
    assert torch.equal(draws[0], update(0, torch.bfloat16))
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) * exact.sign()).sum().item() == pytest.approx(exact.abs().sum().item(), rel=0.25)


@each_rule
@pytest.mark.parametrize("options", [{}, {"states": "8bit", "master_weights": "8bit"}, {"master_weights": False}])
def test_a_gradient_of_zero_changes_nothing_but_the_decay(rule, options):
    named = parameters()
    before = copies(named)
    optimizer = RULES[rule](named, weight_decay=0.0, **options)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1e-2)
    assert equal(named, before)
    optimizer.weight_decay = 0.5
    optimizer.step(1.0)
    torch.testing.assert_close(named["q"], 0.5 * before["q"], rtol=2**-7, atol=0)


@each_rule
def test_a_parameter_without_gradient_or_without_elements_is_passed_over(rule):
    named = parameters(shapes={"idle": (4, 5), "empty": (0, 5), "busy": (4, 5)})
    before = copies(named)
    optimizer = RULES[rule](named)
    named["busy"].grad, named["empty"].grad = torch.ones_like(named["busy"]), torch.ones_like(named["empty"])
    optimizer.step(1e-1)
    assert torch.equal(named["idle"], before["idle"])
    assert not torch.equal(named["busy"], before["busy"])
    assert optimizer.steps == {"idle": 0, "empty": 1, "busy": 1}
    optimizer.zero_grad()
    assert named["busy"].grad is None


@each_rule
def test_every_expert_is_updated_as_a_matrix_of_its_own(rule):
    stacked = parameters(torch.float32, shapes={"experts": (3, 20, 30)})
    apart = {str(index): nn.Parameter(matrix.clone()) for index, matrix in enumerate(stacked["experts"].detach())}
    first, second = RULES[rule](stacked, states="8bit"), RULES[rule](apart, states="8bit")
    for step in range(3):
        set_gradients(stacked, step)
        for index, parameter in enumerate(apart.values()):
            parameter.grad = stacked["experts"].grad[index].clone()
        first.step(1e-2)
        second.step(1e-2)
    assert torch.equal(stacked["experts"], torch.stack(list(apart.values())))


@each_rule
def test_unknown_options_and_vectors_are_refused(rule):
    make = RULES[rule]
    with pytest.raises(ConfigError, match=r"'4bit'. Known: fp32, bf16, 8bit"):
        make({}, states="4bit")
    with pytest.raises(ConfigError, match=r"'16bit'. Known: True, False, 8bit"):
        make({}, master_weights="16bit")
    with pytest.raises(ConfigError, match=r"in \[0, 1\), not 1.5"):
        make({}, momentum=1.5)
    with pytest.raises(ConfigError, match=r"norm has the shape \(5,\). Leave it to AdamW"):
        make({"norm": nn.Parameter(torch.ones(5))})


@pytest.mark.parametrize("make", [partial(SCALE, norm="row"), partial(SCALE, norm="both", momentum=0.9)])
def test_what_needs_whole_matrices_refuses_shared_rows(make):
    sharded = nn.Parameter(torch.ones(2, 2))
    sharded.device_mesh = SimpleNamespace(size=lambda dim: 2, get_group=lambda dim: None)
    sharded.placements = (SimpleNamespace(is_shard=lambda: True),)
    with pytest.raises(ConfigError, match=r"w is sharded over ranks"):
        make({"w": sharded})
