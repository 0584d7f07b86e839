"""BAdam: whose turn it is, by the schedule, and what the update rules then hold and move."""

import copy
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steplm.config import load_config
from steplm.data.loader import Batch
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.models.activations import checkpoint_layers
from steplm.models.build import build_model, hf_config, initial_state
from steplm.optim.adamw import AdamW
from steplm.optim.build import build_rules, reassign
from steplm.optim.muon import Muon
from steplm.pet.trainable import apply_trainable
from steplm.planner.methods import active_block
from steplm.planner.plan import plan
from steplm.schedule import Entry, Phase, Trained, trained_patterns
from steplm.training.step import StepOptions, forward_backward, train_step

PREFIX = "model.layers"
LAYER_OF = re.compile(rf"{re.escape(PREFIX)}\.(\d+)\.")
HOW = StepOptions(micro_batch_size=4, chunk_size=8)
FUSED = StepOptions(micro_batch_size=4, chunk_size=8, fused_backward=True)


class Run:
    """The model of a run of BAdam, its phases, and the rules of the phase that is on."""

    def __init__(self, num_layers=3, dtype=torch.float32, *overrides):
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        values = {
            "method": "badam",
            "seed": 3,
            "model": {
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": num_layers, "num_attention_heads": 2,
                "vocab_size": 40, "max_position_embeddings": 16,
            },
            "plan": {"num_stages": 1, "total_tokens": 64 * 32},
            "optim": {"switch_steps": 2},
            "train": {"precision": precision, "sequence_length": 8, "per_device_train_batch_size": 4},
        }  # fmt: skip
        self.config = load_config(values, overrides)
        made = plan(self.config)
        self.shape, self.phases = made.shape, made.schedule.phases
        self.switch_steps = self.config.optim.switch_steps
        model_config = hf_config(self.config.model.hf_config())
        self.model = build_model(model_config, initial_state(model_config, seed=0, dtype=dtype)).train()
        self.begin(self.phases[0])

    def begin(self, phase):
        """A phase with rules of its own, as after a resume."""
        self.phase = phase
        apply_trainable(self.model, trained_patterns(phase, self.shape))
        self.rules = build_rules(self.config, self.model, phase, PREFIX)

    def go_on(self, phase):
        """The next phase, as training goes on with it."""
        self.phase = phase
        self.rules.zero_grad()
        apply_trainable(self.model, trained_patterns(phase, self.shape))
        reassign(self.rules, self.config, self.model, phase, PREFIX)

    @property
    def active(self):
        (layer,) = self.phase.trained_layers
        return layer

    def train(self, steps, how=HOW):
        """Losses of these steps; step ``t`` sees batch ``t``, and turns change by themselves."""
        losses = []
        for t in steps:
            if (phase := self.phases[t // self.switch_steps]) is not self.phase:
                self.go_on(phase)
            losses.append(update(self.model, self.rules, t, how))
        return losses


def update(model, rules, step, how=HOW):
    return train_step(model, rules, batch(step), how, learning_rate=1e-2 / (1 + step), max_grad_norm=None).loss


def batch(number):
    tokens = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(number))
    return Batch(tokens[:, :-1], tokens[:, 1:].clone())


def layer_of(name):
    match = LAYER_OF.match(name)
    return int(match.group(1)) if match else None


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved_layers(model, before):
    return {layer_of(name) for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))
def test_every_block_has_one_turn_in_every_pass(num_blocks, seed, number_of_pass):
    turns = range(number_of_pass * num_blocks, (number_of_pass + 1) * num_blocks)
    blocks = [active_block(turn, num_blocks=num_blocks, seed=seed) for turn in turns]
    assert Counter(blocks) == dict.fromkeys(range(num_blocks), 1)


def test_the_order_of_the_blocks_depends_on_the_seed_and_on_the_pass():
    def order(seed, number_of_pass):
        turns = range(8 * number_of_pass, 8 * (number_of_pass + 1))
        return tuple(active_block(turn, num_blocks=8, seed=seed) for turn in turns)

    assert order(0, 0) == (5, 0, 3, 6, 4, 7, 2, 1), "an unfinished run needs the same order from every release"
    assert len({order(seed, number) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("switch_steps", [1, 5, 64, 1000])
def test_the_schedule_gives_every_turn_its_steps(switch_steps):
    run = Run(3, torch.float32, f"optim.switch_steps={switch_steps}")
    steps = [phase.tokens // run.config.step_tokens for phase in run.phases]
    assert sum(steps) == 64
    assert all(count == switch_steps for count in steps[:-1])
    assert steps[-1] <= switch_steps
    assert [phase.trained_layers for phase in run.phases] == [
        (active_block(turn, num_blocks=3, seed=3),) for turn in range(len(steps))
    ]


@pytest.mark.parametrize("how", [HOW, FUSED])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_one_layer_and_no_switch_it_is_adamw_bit_by_bit(dtype, states, how):
    ours, theirs = (Run(1, dtype, "optim.switch_steps=64", f"memory.optimizer_states={states}") for _ in range(2))
    reference = AdamW(theirs.model.named_parameters(), states=states)
    assert ours.train(range(4), how) == [update(theirs.model, reference, t, how) for t in range(4)]
    assert_equal(weights_of(ours.model), weights_of(theirs.model))
    assert_equal(ours.rules.state_dict()[0], reference.state_dict()[0])
    assert ours.rules.steps == reference.steps


@pytest.mark.parametrize("how", [HOW, FUSED])
def test_the_active_layer_moves_as_under_adamw_with_the_others_frozen_and_they_stay(how):
    ours, theirs = (Run(3, torch.float32, "optim.switch_steps=64") for _ in range(2))
    before = weights_of(ours.model)
    trained = {n: p for n, p in theirs.model.named_parameters() if layer_of(n) in (ours.active, None)}
    ours.train(range(5), how)
    reference = AdamW(trained)
    for step in range(5):
        update(theirs.model, reference, step, how)
    assert_equal(weights_of(ours.model), weights_of(theirs.model))
    assert moved_layers(ours.model, before) == {ours.active, None}


@pytest.mark.parametrize("how", [HOW, FUSED])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_only_the_active_layer_moves_in_its_turn_and_each_has_one_in_a_pass(rule, how):
    run = Run(3, torch.float32, f"optim.name={rule}")
    turns = []
    for turn in range(6):
        before = weights_of(run.model)
        run.train(range(2 * turn, 2 * turn + 2), how)
        assert moved_layers(run.model, before) == {run.active, None}
        turns.append(run.active)
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_a_turn_begins_with_empty_moments_and_the_weight_as_master_and_outer_states_last():
    run = Run(3, torch.bfloat16)
    first = run.active
    run.train(range(2))
    run.go_on(run.phases[1])
    assert run.active != first
    states = run.rules.state_tensors()
    assert {layer_of(name) for name in states} == {run.active, None}
    for name, held in states.items():
        if layer_of(name) == run.active:
            assert not held["exp_avg"].any()
            assert not held["exp_avg_sq"].any()
            assert torch.equal(held["master"], run.model.get_parameter(name).float())
            assert run.rules.steps[name] == 0
        else:
            assert held["exp_avg"].any()
            assert run.rules.steps[name] == 2


@pytest.mark.parametrize("how", [HOW, FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_before", [3, 4, 6])  # within a turn, at a switch, at the end of a pass
def test_resumed_it_goes_on_bit_for_bit(num_before, dtype, how):
    unbroken, resumed = Run(3, dtype), Run(3, dtype)
    unbroken.train(range(num_before), how)
    tensors, steps = copy.deepcopy(unbroken.rules.state_dict())
    resumed.model.load_state_dict(copy.deepcopy(unbroken.model.state_dict()))
    resumed.begin(unbroken.phase)  # that of the checkpoint
    resumed.rules.load_state_dict(tensors, steps)
    rest = range(num_before, num_before + 5)
    assert unbroken.train(rest, how) == resumed.train(rest, how)
    assert_equal(weights_of(unbroken.model), weights_of(resumed.model))
    assert_equal(unbroken.rules.state_dict()[0], resumed.rules.state_dict()[0])
    assert unbroken.rules.steps == resumed.rules.steps


def test_a_state_of_another_turn_is_refused():
    saved, other, same = Run().rules.state_dict(), Run(), Run()
    other.begin(other.phases[1])
    with pytest.raises(CheckpointMismatch, match=r"missing: model\.layers\.\d.*unknown: model\.layers\.\d"):
        other.rules.load_state_dict(*saved)
    without = {name: t for name, t in saved[0].items() if name != "model.norm.weight.exp_avg"}
    with pytest.raises(CheckpointMismatch, match=r"missing: model\.norm\.weight\.exp_avg"):
        same.rules.load_state_dict(without, saved[1])


def test_of_another_turns_state_a_turn_can_take_that_outside_the_layers():
    run, other = Run(), Run()
    run.train(range(2))
    tensors, steps = run.rules.state_dict()
    other.begin(other.phases[1])
    other.rules.load_state_dict(tensors, steps, strict=False)
    for name, held in other.rules.state_tensors().items():
        is_outer = layer_of(name) is None
        assert other.rules.steps[name] == (2 if is_outer else 0)
        assert bool(held["exp_avg"].any()) == is_outer
        assert not is_outer or torch.equal(held["exp_avg"], tensors[f"{name}.exp_avg"])


@pytest.mark.parametrize(("dtype", "state_bytes"), [(torch.bfloat16, 12), (torch.float32, 8)])
def test_state_and_gradient_bytes_are_those_of_one_layer_and_the_outer_parameters_at_every_step(dtype, state_bytes):
    run = Run(4, dtype, "optim.switch_steps=1")
    one_layer, outer = run.shape.layer_parameters, run.shape.outer_parameters
    for number, phase in enumerate(run.phases[:6]):
        if number:
            run.go_on(phase)
            assert all(parameter.grad is None for parameter in run.model.parameters())
        held = [tensor for states in run.rules.state_tensors().values() for tensor in states.values()]
        assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)
        assert sum(t.untyped_storage().nbytes() for t in held) == state_bytes * (one_layer + outer)
        forward_backward(run.model, batch(number), HOW)
        with_gradient = [p for p in run.model.parameters() if p.grad is not None]
        assert sum(p.numel() for p in with_gradient) == one_layer + outer
        run.rules.step(1e-3)


@pytest.mark.parametrize(("rule", "kind"), [("adamw", AdamW), ("muon", Muon)])
def test_old_states_are_freed_before_new_ones_are_made(monkeypatch, rule, kind):
    run = Run(3, torch.bfloat16, f"optim.name={rule}")
    made, held = [], []
    make = kind._new_states

    def watched(self, name, parameter):
        made.append(layer_of(name))
        held.append({layer_of(name) for name in self.state_tensors()})
        return make(self, name, parameter)

    first, outer_states = run.active, run.rules.state_tensors()["model.norm.weight"]["exp_avg"]
    monkeypatch.setattr(kind, "_new_states", watched)
    run.go_on(run.phases[1])
    assert set(made) == {run.active}
    assert held[0] <= {None}, "states of the layer before are gone"
    assert not any(first in layers for layers in held)
    assert run.rules.state_tensors()["model.norm.weight"]["exp_avg"] is outer_states


def test_muon_takes_the_matrices_of_the_layer_whose_turn_it_is_and_adamw_the_rest():
    run = Run(3, torch.bfloat16, "optim.name=muon")
    for phase in run.phases[:4]:
        if phase is not run.phase:
            run.go_on(phase)
        of_muon = run.rules.rules["muon"].parameters
        assert {layer_of(name) for name in of_muon} == {run.active}
        assert len(of_muon) == len(run.shape.linears)
        of_adamw = run.rules.rules["adamw"].parameters
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in of_adamw if layer_of(name) is not None} == {
            "input_layernorm",
            "post_attention_layernorm",
        }


def test_a_rule_that_was_not_there_cannot_begin_within_a_stage():
    run = Run()
    muon = Phase(2, 1, Entry("go_on"), (Trained("muon"),) * 3, Trained(), 0, 0, 0)
    with pytest.raises(ConfigError, match="muon begins within a stage"):
        run.go_on(muon)


def test_activation_checkpointing_gives_the_same_gradients_and_none_to_inactive_layers():
    plain, checkpointed = Run(), Run()
    checkpoint_layers(checkpointed.model, range(3), PREFIX)
    for t in range(7):
        losses = []
        for run in (plain, checkpointed):
            if (phase := run.phases[t // 2]) is not run.phase:
                run.go_on(phase)
            losses.append(forward_backward(run.model, batch(t), HOW))
            with_gradient = {layer_of(name) for name, p in run.model.named_parameters() if p.grad is not None}
            assert with_gradient == {run.active, None}
            run.rules.step(1e-2)
            run.rules.zero_grad()
        assert torch.equal(*losses)
    assert_equal(weights_of(plain.model), weights_of(checkpointed.model))


def test_tied_embeddings_are_outside_the_layers_and_trained_all_the_time():
    run = Run(3, torch.float32, "model.tie_word_embeddings=true", "optim.switch_steps=1")
    run.train(range(3))
    assert run.rules.steps["model.embed_tokens.weight"] == 3
    assert "lm_head.weight" not in run.rules.parameters


@pytest.mark.parametrize("how", [HOW, FUSED])
def test_the_loss_goes_down_while_the_layers_take_turns(how):
    run = Run(3, torch.float32, "optim.switch_steps=5")
    losses = []
    for t in range(30):
        if (phase := run.phases[t // 5]) is not run.phase:
            run.go_on(phase)
        result = train_step(run.model, run.rules, batch(0), how, learning_rate=1e-2, max_grad_norm=None)
        losses.append(result.loss)
    assert losses[-1] < 0.6 * losses[0]
