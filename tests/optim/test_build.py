"""Which rule updates which parameter, and several rules as one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steplm.config import load_config
from steplm.errors import CheckpointMismatch
from steplm.optim.adamw import AdamW
from steplm.optim.build import build_rules, rule_of_each
from steplm.optim.low_rank import SCALES, LowRankAdamW
from steplm.schedule import Adapter, Entry, Frozen, Phase, Trained

METHODS = list(SCALES)
MATRICES = {"layers.0.tall.weight": (24, 10), "layers.0.wide.weight": (10, 24), "layers.1.square.weight": (12, 12)}
OTHERS = {
    "embed.weight": (30, 10),
    "layers.0.norm.weight": (10,),
    "layers.0.narrow.weight": (4, 24),  # its smaller side is the rank
    "layers.0.router": (9, 12),  # no linear map
}
SHAPES = MATRICES | OTHERS


class Model(nn.Module):
    """Parameters of these names, in a list of layers: linear layers, a norm, and a matrix that is none."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for name, shape in SHAPES.items():
            module, _, key = name.rpartition(".")
            value = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            parent = self.layers[int(module.split(".")[1])] if module.startswith("layers.") else self
            if key == "weight":
                child = nn.Linear(1, 1, bias=False) if parent is not self and len(shape) == 2 else nn.Module()
                setattr(parent, module.rpartition(".")[2], child)
                parent = child
            setattr(parent, key, value)


def phase_of(*layers, outside=None):
    return Phase(1, 1, Entry("fresh"), layers, outside or Trained(), 0, 0, 0)


def config_of(*overrides):
    return load_config({"optim": {"rank": 4, "update_proj_gap": 3}}, overrides)


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for _, parameter in sorted(model.named_parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(model, rules, steps=range(4)):
    for step in steps:
        torch.manual_seed(step)
        set_gradients(model, step)
        rules.step(1e-2, 0.5)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def build(model, phase, *overrides):
    return build_rules(config_of(*overrides), model, phase, "layers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_all_other_parameters_are_those_of_adamw_bit_for_bit(method, dtype):
    model, plain = Model(dtype), Model(dtype)
    rules = build(model, phase_of(Trained(method), Trained(method)))
    low_rank = MATRICES.keys() | ({"layers.0.narrow.weight"} if method == "apollo_mini" else set())
    assert rules.rules[method].parameters.keys() == low_rank
    rest = {name: p for name, p in plain.named_parameters() if name not in low_rank}
    adamw = AdamW(rest)
    after, reference = train(model, rules), train(plain, adamw)
    assert all(torch.equal(after[name], reference[name]) for name in rest)
    states = rules.state_tensors()
    for name, held in adamw.state_tensors().items():
        assert states[name].keys() == held.keys()
        assert all(torch.equal(states[name][key], tensor) for key, tensor in held.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_rules_own_matrices_are_those_of_the_rule_alone(method, dtype):
    model, plain = Model(dtype), Model(dtype)
    rules = build(model, phase_of(Trained(method), Trained(method)))
    alone = {name: plain.get_parameter(name) for name in MATRICES}
    reference = LowRankAdamW(alone, method=method, rank=4, update_proj_gap=3)
    after, expected = train(model, rules), train(plain, reference)
    assert all(torch.equal(after[name], expected[name]) for name in MATRICES)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), excess=st.integers(0, 3), method=st.sampled_from(METHODS[:2]))
def test_a_rank_that_is_not_below_a_side_means_adamw(rows, columns, excess, method):
    def rule(rank):
        config = config_of(f"optim.rank={rank}")
        shapes = {"layers.0.q.weight": (rows, columns)}
        return rule_of_each(shapes, phase_of(Trained(method)), "layers", {"q"}, config)["layers.0.q.weight"]

    smaller = min(rows, columns)
    assert rule(smaller + excess) == "adamw"
    assert smaller == 1 or rule(smaller - 1) == method


@pytest.mark.parametrize(
    ("name", "shape", "low_rank", "muon"),
    [
        ("model.layers.3.mlp.up_proj.weight", (9, 5), True, True),
        ("model.layers.13.mlp.up_proj.weight", (5, 9), True, True),
        ("model.layers.3.mlp.up_proj.weight", (9, 4), False, True),
        ("model.layers.3.mlp.up_proj.bias", (9,), False, False),
        ("model.layers.3.mlp.gate.weight", (9, 5), False, False),
        ("model.layers.3.input_layernorm.weight", (9,), False, False),
        ("model.layers.3.mlp.experts.up_proj", (8, 9, 5), False, True),
        ("model.layers_norm.weight", (9, 5), False, False),
        ("model.embed_tokens.weight", (9, 5), False, False),
        ("lm_head.weight", (9, 5), False, False),
    ],
)
def test_a_rule_takes_matrices_of_layers_and_adamw_all_else(name, shape, low_rank, muon):
    for rule, takes in (("galore", low_rank), ("muon", muon)):
        phase = phase_of(*(Trained(rule),) * 14)
        found = rule_of_each({name: shape}, phase, "model.layers", {"mlp.up_proj"}, config_of())
        assert found == {name: rule if takes else "adamw"}


@pytest.mark.parametrize("rule", ["adamw", "muon", "galore"])
def test_factors_of_adapters_go_by_the_rule_of_their_adapter(rule):
    adapter = Adapter(8, 8.0, ("up_proj",), rule=rule)
    phase = phase_of(adapter, Trained("muon"), Frozen(), outside=adapter)
    factors = {
        f"model.layers.{layer}.mlp.up_proj.{key}": shape
        for layer in (0, 2)
        for key, shape in (("lora_A", (8, 16)), ("lora_B", (24, 8)))
    }
    outer = {"model.embed_tokens.lora_A": (8, 40)}
    found = rule_of_each(factors | outer, phase, "model.layers", {"mlp.up_proj"}, config_of())
    assert {name.rpartition(".")[2]: found[name] for name in factors if ".0." in name} == dict.fromkeys(
        ("lora_A", "lora_B"), rule
    )
    assert {found[name] for name in (*outer, *(name for name in factors if ".2." in name))} == {"adamw"}


@pytest.mark.parametrize("method", METHODS)
def test_each_layer_is_updated_by_its_own_rule(method):
    models = [Model(torch.bfloat16) for _ in range(3)]
    roles = [(Trained(), Trained(method)), (Trained(method), Trained(method)), (Trained(), Trained())]
    mixed, everywhere, nowhere = (
        train(model, build(model, phase_of(*layers))) for model, layers in zip(models, roles, strict=True)
    )
    for name, weight in mixed.items():
        reference = everywhere if name.startswith("layers.1.") else nowhere
        assert torch.equal(weight, reference[name]), name
    assert not torch.equal(mixed["layers.1.square.weight"], nowhere["layers.1.square.weight"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("of", ["adamw", "itself"])
def test_master_weights_of_one_rule_alone(method, of):
    model = Model(torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    named = method if of == "itself" else of
    rules = build(model, phase_of(Trained(method), Trained(method)), f"memory.master_weights={named}")
    without = {name for name, states in rules.state_tensors().items() if "master" not in states}
    low_rank = set(rules.rules[method].parameters)
    assert low_rank >= set(MATRICES)
    assert without == (low_rank if of == "adamw" else set(before) - low_rank)
    after = train(model, rules)
    assert not any(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "overrides",
    [
        (), ("memory.master_weights=8bit",), ("memory.optimizer_states=8bit", "memory.master_weights=false"),
    ],
)  # fmt: skip
def test_rules_go_on_bit_for_bit_from_their_saved_states(overrides):
    phase = phase_of(Trained("muon"), Trained("scale"))
    model, resumed = Model(torch.bfloat16), Model(torch.bfloat16)
    rules = build(model, phase, *overrides)
    train(model, rules, range(3))
    tensors, steps = rules.state_dict()
    assert list(steps) == [name for name, _ in model.named_parameters()]
    assert set(steps.values()) == {3}
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(model.get_parameter(name))
    second = build(resumed, phase, *overrides)
    second.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, steps)
    whole, stopped = train(model, rules, range(3, 6)), train(resumed, second, range(3, 6))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    ours, theirs = rules.state_dict(), second.state_dict()
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(tensor, theirs[0][key]) for key, tensor in ours[0].items())


def test_states_that_no_rule_has_or_that_a_rule_lacks_are_refused():
    model = Model()
    phase = phase_of(Trained("muon"), Trained("muon"))
    tensors, steps = build(model, phase).state_dict()
    with pytest.raises(CheckpointMismatch, match=r"unknown: .*elsewhere\.weight"):
        build(model, phase).load_state_dict(tensors, steps | {"elsewhere.weight": 1})
    stray = {"elsewhere.weight.exp_avg": torch.zeros(1)}
    with pytest.raises(CheckpointMismatch, match=r"unknown: elsewhere\.weight\.exp_avg"):
        build(model, phase).load_state_dict(tensors | stray, steps)
    missing = {key: tensor for key, tensor in tensors.items() if not key.startswith("layers.0.tall.weight")}
    with pytest.raises(CheckpointMismatch, match=r"missing: layers\.0\.tall\.weight"):
        build(model, phase).load_state_dict(missing, steps)
    with pytest.raises(CheckpointMismatch):
        build(model, phase_of(Trained(), Trained())).load_state_dict(tensors, steps)


def test_rules_share_their_tables_of_8_bit_states():
    model, plain = Model(torch.bfloat16), Model(torch.bfloat16)
    states = "memory.optimizer_states=8bit"
    both = build(model, phase_of(Trained("muon"), Trained("muon")), states)
    adamw = build(plain, phase_of(Trained(), Trained()), states)
    for tables in (both.tables(), adamw.tables()):
        assert len({table.data_ptr() for table in tables}) == len(tables)
    assert len(both.tables()) == len(adamw.tables())  # of signed and of unsigned states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_inside_the_backward_pass_is_that_after_it_whatever_the_rules(dtype):
    def loss(model):
        return sum((parameter.float() ** 3).sum() for parameter in model.parameters())

    phase = phase_of(Trained("muon"), Trained("galore"))
    fused, plain = Model(dtype), Model(dtype)
    rules, reference = build(fused, phase), build(plain, phase)
    for _ in range(3):
        with rules.in_backward(1e-3) as norm:
            loss(fused).backward()
        loss(plain).backward()
        gradients = torch.cat([parameter.grad.flatten().double() for parameter in plain.parameters()])
        assert norm.total().item() == pytest.approx(gradients.norm().item(), rel=1e-5)
        assert all(parameter.grad is None for parameter in fused.parameters())
        reference.step(1e-3)
        reference.zero_grad()
    for name, parameter in fused.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert rules.steps == reference.steps == dict.fromkeys(rules.parameters, 3)


def test_muon_knows_the_fused_maps_that_are_planned():
    phi3 = ("model.model_type=phi3", "model.extra={pad_token_id: 0}", "optim.name=muon")
    sizes = ("model.hidden_size=64", "model.num_attention_heads=8", "model.intermediate_size=100")
    (_, muon) = build(Model(), phase_of(Trained("muon"), Trained("muon")), *phi3, *sizes).rules.values()
    assert muon.row_blocks == {(192, 64): (64, 64, 64), (200, 64): (100, 100)}
    (_, muon) = build(Model(), phase_of(Trained("muon"), Trained("muon")), *sizes).rules.values()
    assert not muon.row_blocks
