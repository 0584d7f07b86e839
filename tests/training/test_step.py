import copy
import math

import pytest
import torch

from steplm.data.loader import Batch
from steplm.models.build import build_model, hf_config, initial_state
from steplm.optim.adamw import AdamW, clip_coefficient
from steplm.optim.base import global_grad_norm
from steplm.optim.build import UpdateRules
from steplm.training.step import StepOptions, forward_backward, train_step, trial

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}


def how(fused: bool = False, micro_batch_size: int = 4) -> StepOptions:
    return StepOptions(micro_batch_size=micro_batch_size, chunk_size=8, fused_backward=fused)


def build(tied: bool = False, dtype: torch.dtype = torch.float32):
    config = hf_config({**MODEL, "tie_word_embeddings": tied})
    model = build_model(config, initial_state(config, seed=0, dtype=dtype)).train()
    rule = AdamW({name: p for name, p in model.named_parameters() if p.requires_grad})
    return model, UpdateRules({"adamw": rule}, rule.parameters)


def batch(seed: int, num_sequences: int = 4) -> Batch:
    tokens = torch.randint(0, 40, (num_sequences, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:].clone())


def snapshot(model, optimizer):
    return copy.deepcopy({**model.state_dict(), **optimizer.state_dict()[0]}), dict(optimizer.steps)


def same(first, second) -> bool:
    return first[1] == second[1] and all(torch.equal(first[0][key], second[0][key]) for key in first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_fused_steps_equal_ordinary_ones_without_clipping(tied, dtype):
    results = []
    for fused in (False, True):
        model, optimizer = build(tied, dtype)
        steps = [
            train_step(model, optimizer, batch(seed), how(fused), learning_rate=1e-2, max_grad_norm=None)
            for seed in range(3)
        ]
        assert all(parameter.grad is None for parameter in model.parameters())
        results.append((steps, snapshot(model, optimizer)))
    (ordinary, plain), (fused_steps, fused_state) = results
    assert same(plain, fused_state)
    assert [step.loss for step in ordinary] == [step.loss for step in fused_steps]
    assert [step.grad_norm for step in fused_steps] == pytest.approx([step.grad_norm for step in ordinary], rel=1e-6)
    assert set(plain[1].values()) == {3}


def test_clipping_scales_the_gradient_and_reports_the_norm_before_it():
    model, optimizer = build()
    norms = []
    optimizer.step = lambda rate, grad_scale: norms.append(grad_scale)
    result = train_step(model, optimizer, batch(0), how(), learning_rate=1e-2, max_grad_norm=0.01)
    forward_backward(model, batch(0), how())
    assert result.grad_norm == global_grad_norm(model.parameters()).item() > 0.01
    assert norms == [pytest.approx(0.01 / result.grad_norm, rel=1e-4)]


def test_gradients_do_not_depend_on_the_micro_batch():
    model, _ = build()
    ragged = batch(0)
    ragged.labels[1, 3:] = -100  # a mean of means would weigh these rows wrongly
    whole = forward_backward(model, ragged, how())
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    split = forward_backward(model, ragged, how(micro_batch_size=1))
    torch.testing.assert_close(split, whole)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_trial_gives_loss_and_norm_of_a_step_and_changes_nothing(fused):
    model, optimizer = build()
    before = snapshot(model, optimizer)
    tried = trial(model, optimizer, batch(0), how(fused))
    assert same(before, snapshot(model, optimizer))
    assert all(parameter.grad is None for parameter in model.parameters())
    result = train_step(model, optimizer, batch(0), how(), learning_rate=1e-2, max_grad_norm=None)
    assert tried == (result.loss, pytest.approx(result.grad_norm, rel=1e-6))


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_not_finite_updates_nothing(fused):
    model, optimizer = build()
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    before = snapshot(model, optimizer)
    result = train_step(model, optimizer, batch(0), how(fused), learning_rate=1e-2, max_grad_norm=None)
    assert not result.is_finite
    assert same(before, snapshot(model, optimizer))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not math.isfinite(trial(model, optimizer, batch(0), how(fused))[0])


def test_fused_clips_by_the_norm_of_the_step_before():
    (model, optimizer), (reference, stepping) = build(), build()
    options = {"learning_rate": 1e-2, "max_grad_norm": 0.5}
    fused = train_step(model, optimizer, batch(0), how(fused=True), **options, last_grad_norm=4.0)
    forward_backward(reference, batch(0), how())
    stepping.step(1e-2, grad_scale=clip_coefficient(4.0, 0.5))
    stepping.zero_grad()
    assert same(snapshot(model, optimizer), snapshot(reference, stepping))
    assert fused.grad_norm > 0.5, "it is told as it was, before clipping"
    # Of the first step there is none before, and a smaller one than the limit changes nothing.
    for last in (None, 0.1):
        (model, optimizer), (reference, stepping) = build(), build()
        train_step(model, optimizer, batch(0), how(fused=True), **options, last_grad_norm=last)
        train_step(reference, stepping, batch(0), how(fused=True), learning_rate=1e-2, max_grad_norm=None)
        assert same(snapshot(model, optimizer), snapshot(reference, stepping))


def test_fused_refuses_accumulation():
    model, optimizer = build()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="5 sequences in micro-batches of 4"):
        train_step(model, optimizer, batch(0, 5), how(fused=True), learning_rate=1e-2, max_grad_norm=None)
    with pytest.raises(ValueError, match="5 sequences in micro-batches of 4"):
        trial(model, optimizer, batch(0, 5), how(fused=True))
    assert same(before, snapshot(model, optimizer))
