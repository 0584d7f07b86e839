import copy
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steplm.data.loader import Batch
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.models.activations import checkpoint_layers
from steplm.models.build import build_model, hf_config, initial_state
from steplm.models.forward import mean_loss
from steplm.optim.adamw import AdamW
from steplm.optim.block import BlockAdamW, active_block
from steplm.training.step import Pass, forward_backward, train_step, trial

PREFIX = "model.layers"
LAYER_OF = re.compile(rf"{re.escape(PREFIX)}\.(\d+)\.")
SEED = 3
HOW = Pass(micro_batch_size=4, chunk_size=8)
FUSED = Pass(micro_batch_size=4, chunk_size=8, fused_backward=True)


def build(num_layers=3, dtype=torch.float32, tied=False):
    config = hf_config(
        {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "vocab_size": 40,
            "max_position_embeddings": 16,
            "tie_word_embeddings": tied,
        }
    )
    return build_model(config, initial_state(config, seed=0, dtype=dtype)).train()


def badam(model, **options):
    return BlockAdamW(model.named_parameters(), layer_prefix=PREFIX, seed=SEED, **options)


def batch(number):
    tokens = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(number))
    return Batch(tokens[:, :-1], tokens[:, 1:].clone())


def train(model, optimizer, steps, how=HOW):
    """Losses of these steps; step ``t`` sees batch ``t``."""
    return [
        train_step(model, optimizer, batch(t), how, learning_rate=1e-2 / (1 + t), max_grad_norm=None).loss
        for t in steps
    ]


def layer_of(name):
    match = LAYER_OF.match(name)
    return int(match.group(1)) if match else None


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@given(st.integers(1, 12), st.integers(0, 5), st.integers(1, 7), st.integers(0, 5))
def test_every_block_has_one_turn_of_switch_steps_in_every_pass(num_blocks, seed, switch_steps, number_of_pass):
    length = num_blocks * switch_steps
    steps = range(number_of_pass * length, (number_of_pass + 1) * length)
    blocks = [active_block(t, num_blocks=num_blocks, seed=seed, switch_steps=switch_steps) for t in steps]
    assert Counter(blocks) == dict.fromkeys(range(num_blocks), switch_steps)
    changes = [t for t in range(1, length) if blocks[t] != blocks[t - 1]]
    assert changes == list(range(switch_steps, length, switch_steps))


def test_the_order_of_the_blocks_depends_on_the_seed_and_on_the_pass():
    def order(seed, number_of_pass):
        steps = range(8 * number_of_pass, 8 * (number_of_pass + 1))
        return tuple(active_block(t, num_blocks=8, seed=seed, switch_steps=1) for t in steps)

    assert order(0, 0) == (5, 0, 3, 6, 4, 7, 2, 1), "an unfinished run needs the same order from every release"
    assert len({order(seed, number) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("how", [HOW, FUSED])
@pytest.mark.parametrize("options", [{}, {"states": "8bit"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_one_layer_and_no_switch_it_is_adamw_bit_by_bit(dtype, options, how):
    ours, theirs = build(1, dtype), build(1, dtype)
    optimizer, reference = badam(ours, **options), AdamW(theirs.named_parameters(), **options)
    assert train(ours, optimizer, range(4), how) == train(theirs, reference, range(4), how)
    assert_equal(weights_of(ours), weights_of(theirs))
    assert_equal(optimizer.state_dict()[0], reference.state_dict()[0])
    assert optimizer.steps == reference.steps


@pytest.mark.parametrize("how", [HOW, FUSED])
def test_the_active_layer_moves_as_under_adamw_with_the_others_frozen_and_they_stay(how):
    ours, theirs = build(), build()
    before = weights_of(ours)
    optimizer = badam(ours, switch_steps=1000)
    active = optimizer.active_layer
    trained = {name: p for name, p in theirs.named_parameters() if layer_of(name) in (active, None)}
    theirs.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    train(ours, optimizer, range(5), how)
    train(theirs, AdamW(trained), range(5), how)
    after = weights_of(ours)
    assert_equal(after, weights_of(theirs))
    moved = {layer_of(name) for name in after if not torch.equal(after[name], before[name])}
    assert moved == {active, None}


@pytest.mark.parametrize("how", [HOW, FUSED])
def test_only_the_active_layer_moves_in_its_turn_and_each_has_one_in_a_pass(how):
    model = build()
    optimizer = badam(model, switch_steps=2)
    turns = []
    for turn in range(6):
        before, active = weights_of(model), optimizer.active_layer
        train(model, optimizer, range(2 * turn, 2 * turn + 2), how)
        after = weights_of(model)
        moved = {layer_of(name) for name in after if not torch.equal(after[name], before[name])}
        assert moved == {active, None}
        turns.append(active)
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_a_turn_begins_with_empty_moments_and_the_weight_as_master_and_outer_states_last():
    model = build(dtype=torch.bfloat16)
    optimizer = badam(model, switch_steps=2)
    first = optimizer.active_layer
    train(model, optimizer, range(2))
    second = optimizer.active_layer
    assert first != second
    states = optimizer.state_tensors()
    assert {layer_of(name) for name in states} == {second, None}
    for name, held in states.items():
        if layer_of(name) == second:
            assert not held["exp_avg"].any()
            assert not held["exp_avg_sq"].any()
            assert torch.equal(held["master"], model.get_parameter(name).float())
            assert optimizer.steps[name] == 0
        else:
            assert held["exp_avg"].any()
            assert optimizer.steps[name] == 2


@pytest.mark.parametrize("how", [HOW, FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_before", [3, 4, 6])  # within a turn, at a switch, at the end of a pass
def test_resumed_it_goes_on_bit_for_bit(num_before, dtype, how):
    unbroken = build(dtype=dtype)
    optimizer = badam(unbroken, switch_steps=2)
    train(unbroken, optimizer, range(num_before), how)
    tensors, steps = copy.deepcopy(optimizer.state_dict())
    resumed = build(dtype=dtype)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    second = badam(resumed, switch_steps=2, step=num_before)
    second.load_state_dict(tensors, steps)
    rest = range(num_before, num_before + 5)
    assert train(unbroken, optimizer, rest, how) == train(resumed, second, rest, how)
    assert_equal(weights_of(unbroken), weights_of(resumed))
    assert_equal(optimizer.state_dict()[0], second.state_dict()[0])
    assert optimizer.steps == second.steps


def test_a_state_of_another_turn_is_refused():
    model = build()
    optimizer = badam(model, switch_steps=2)
    saved = optimizer.state_dict()
    with pytest.raises(CheckpointMismatch, match=r"missing: model\.layers\.\d.*unknown: model\.layers\.\d"):
        badam(build(), switch_steps=2, step=2).load_state_dict(*saved)
    without = {name: t for name, t in saved[0].items() if name != "model.norm.weight.exp_avg"}
    with pytest.raises(CheckpointMismatch, match=r"missing: model\.norm\.weight\.exp_avg"):
        badam(build(), switch_steps=2).load_state_dict(without, saved[1])


def test_carried_state_is_that_of_the_parameters_outside_the_layers():
    model = build()
    optimizer = badam(model)
    train(model, optimizer, range(3))
    tensors, steps = optimizer.state_dict()
    next_stage = badam(build())
    next_stage.load_state_dict(tensors, steps, strict=False)
    for name, held in next_stage.state_tensors().items():
        is_outer = layer_of(name) is None
        assert next_stage.steps[name] == (3 if is_outer else 0)
        assert torch.equal(held["exp_avg"], tensors[f"{name}.exp_avg"]) == is_outer


@pytest.mark.parametrize(("dtype", "state_bytes"), [(torch.bfloat16, 12), (torch.float32, 8)])
def test_state_and_gradient_bytes_are_those_of_one_layer_and_the_outer_parameters_at_every_step(dtype, state_bytes):
    model = build(4, dtype)
    optimizer = badam(model, switch_steps=1)
    one_layer = sum(p.numel() for name, p in model.named_parameters() if layer_of(name) == 0)
    outer = sum(p.numel() for name, p in model.named_parameters() if layer_of(name) is None)
    for number in range(6):
        held = [tensor for states in optimizer.state_tensors().values() for tensor in states.values()]
        assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)
        assert sum(t.untyped_storage().nbytes() for t in held) == state_bytes * (one_layer + outer)
        forward_backward(model, batch(number), HOW)
        with_gradient = [p for p in model.parameters() if p.grad is not None]
        assert sum(p.numel() for p in with_gradient) == one_layer + outer
        optimizer.step(1e-3)
        left = {layer_of(name) for name, p in model.named_parameters() if p.grad is not None}
        assert left == {None}, "the gradients of a layer go with its turn"
        optimizer.zero_grad()


def test_old_states_are_freed_before_new_ones_are_made(monkeypatch):
    model = build()
    optimizer = badam(model, switch_steps=1)
    made = []
    make = optimizer._adamw

    def watched(parameters):
        if parameters:
            made.append({layer_of(name) for name in optimizer.state_tensors()})
        return make(parameters)

    monkeypatch.setattr(optimizer, "_adamw", watched)
    train(model, optimizer, range(1))
    assert made == [{None}]


def test_activation_checkpointing_gives_the_same_gradients_and_none_to_inactive_layers():
    plain, checkpointed = build(), build()
    checkpoint_layers(checkpointed, range(3), PREFIX)
    runs = [(model, badam(model, switch_steps=2)) for model in (plain, checkpointed)]
    for t in range(7):
        losses = []
        for model, optimizer in runs:
            losses.append(forward_backward(model, batch(t), HOW))
            with_gradient = {layer_of(name) for name, p in model.named_parameters() if p.grad is not None}
            assert with_gradient == {optimizer.active_layer, None}
            optimizer.step(1e-2)
            optimizer.zero_grad()
        assert torch.equal(*losses)
    assert_equal(weights_of(plain), weights_of(checkpointed))


def test_tied_embeddings_are_outside_the_layers_and_trained_all_the_time():
    model = build(tied=True)
    optimizer = badam(model, switch_steps=1)
    train(model, optimizer, range(3))
    assert optimizer.steps["model.embed_tokens.weight"] == 3
    assert "lm_head.weight" not in optimizer.parameters


def test_a_trial_and_an_evaluation_neither_update_nor_end_a_turn():
    model = build()
    optimizer = badam(model, switch_steps=1)
    before, active = weights_of(model), optimizer.active_layer
    norms = [trial(model, optimizer, batch(0), how)[1] for how in (HOW, FUSED)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 0
    evaluated, _ = mean_loss(model, [batch(1)], chunk_size=8)
    assert evaluated == pytest.approx(trial(model, optimizer, batch(1), HOW)[0], rel=1e-6)
    assert optimizer.active_layer == active
    assert_equal(weights_of(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("how", [HOW, FUSED])
def test_the_loss_goes_down_while_the_layers_take_turns(how):
    model = build()
    optimizer = badam(model, switch_steps=5)
    losses = [
        train_step(model, optimizer, batch(0), how, learning_rate=1e-2, max_grad_norm=None).loss for _ in range(30)
    ]
    assert losses[-1] < 0.6 * losses[0]


def test_frozen_layers_take_no_turn():
    model = build()
    trained = {name: p for name, p in model.named_parameters() if layer_of(name) != 1}
    model.requires_grad_(False)
    optimizer = BlockAdamW(trained, layer_prefix=PREFIX, seed=0, switch_steps=1)
    turns = set()
    for t in range(4):
        turns.add(optimizer.active_layer)
        train(model, optimizer, [t])
    assert turns == {0, 2}


def test_what_cannot_take_turns_is_refused():
    model = build(1)
    with pytest.raises(ConfigError, match="cannot be 0 steps long"):
        badam(model, switch_steps=0)
    outer = {name: p for name, p in model.named_parameters() if layer_of(name) is None}
    with pytest.raises(ConfigError, match=r"none of the 3 trained parameters .*Use optim\.name=adamw"):
        BlockAdamW(outer, layer_prefix=PREFIX, seed=0)
