"""Rules as PyTorch optimizers, and PyTorch optimizers as rules."""

import copy
import io
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from steplm.errors import CheckpointMismatch, ConfigError
from steplm.optim.adamw import AdamW
from steplm.optim.muon import Muon
from steplm.optim.torch_optimizer import RuleOptimizer, TorchRule

EXAMPLE = Path(__file__).parents[2] / "examples/own_loop.py"


class Tiny(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden = nn.Embedding(20, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)

    def forward(self, input_ids, labels):
        logits = torch.tanh(self.hidden(self.embed(input_ids))) @ self.embed.weight.T
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


def rules_of(model):
    named = dict(model.named_parameters())
    hidden = {"hidden.weight": named.pop("hidden.weight")}
    return [Muon(hidden, states="8bit", master_weights="8bit"), AdamW(named, states="8bit", master_weights=False)]


def backward(model, step):
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(step))
    loss = model(ids[:, :-1], ids[:, 1:])["loss"]
    loss.backward()
    torch.manual_seed(step)
    return loss


def train(model, optimizer, steps, schedule=None):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_updates_as_the_rules_do_with_the_rates_of_a_scheduler():
    model, reference = Tiny(torch.bfloat16), Tiny(torch.bfloat16)
    optimizer, rules = RuleOptimizer(rules_of(model), lr=1e-2), rules_of(reference)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(model, optimizer, range(3), schedule)
    for step in range(3):
        backward(reference, step)
        for rule in rules:
            rule.step(1e-2 * 0.5**step)
            rule.zero_grad()
    assert equal(model.state_dict(), reference.state_dict())


def test_each_group_has_its_own_rate():
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    optimizer = RuleOptimizer(rules_of(model), lr=1e-2)
    optimizer.param_groups[1]["lr"] = 0.0
    train(model, optimizer, range(1))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"hidden.weight"}


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    model, reference = Tiny(), Tiny()
    optimizer = RuleOptimizer(rules_of(model), lr=1e-2)
    loss = optimizer.step(lambda: backward(model, 0))
    assert loss.item() == backward(reference, 0).item()
    assert {count for rule in optimizer.rules for count in rule.steps.values()} == {1}


def test_saved_with_torch_save_and_loaded_it_goes_on_bit_for_bit():
    model = Tiny(torch.bfloat16)
    optimizer = RuleOptimizer(rules_of(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    train(model, optimizer, range(3), schedule)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    weights, states, progress = torch.load(file, weights_only=True)
    resumed = Tiny(torch.bfloat16)
    resumed.load_state_dict(weights)
    second = RuleOptimizer(rules_of(resumed), lr=1.0)
    then = torch.optim.lr_scheduler.CosineAnnealingLR(second, 6)
    second.load_state_dict(states)
    then.load_state_dict(progress)
    train(model, optimizer, range(3, 6), schedule)
    train(resumed, second, range(3, 6), then)
    assert equal(model.state_dict(), resumed.state_dict())
    assert [rule.steps for rule in optimizer.rules] == [rule.steps for rule in second.rules]
    with pytest.raises(CheckpointMismatch, match=r"missing: embed.weight, .*unknown: hidden.weight"):
        RuleOptimizer(rules_of(model)[::-1], lr=1.0).load_state_dict(
            {**states, "param_groups": second.state_dict()["param_groups"][::-1]}
        )


def test_the_trainer_of_hugging_face_trains_saves_and_resumes_with_it(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 20, (16, 9), generator=generator)
    data = [{"input_ids": row[:-1], "labels": row[1:]} for row in rows]

    def run(resume=None):
        model = Tiny()
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(RuleOptimizer(rules_of(model), 1e-2), None))
        trainer.train(resume_from_checkpoint=resume)
        return model, [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    model, rates = run()
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    resumed, _ = run(str(tmp_path / "checkpoint-2"))
    assert equal(model.state_dict(), resumed.state_dict())
    assert not equal(model.state_dict(), Tiny().state_dict())


def nadam(parameters):
    return torch.optim.NAdam(parameters, weight_decay=0.1)


def test_an_optimizer_of_pytorch_as_a_rule_updates_as_it_does_alone():
    model, reference = Tiny(), Tiny()
    rule = TorchRule(model.named_parameters(), nadam)
    optimizer = torch.optim.NAdam(reference.parameters(), weight_decay=0.1, lr=1e-2)
    for step in range(3):
        backward(model, step)
        gradient = model.hidden.weight.grad.clone()
        rule.step(1e-2, 0.5)
        assert torch.equal(model.hidden.weight.grad, gradient), "grad_scale leaves it as it is"
        rule.zero_grad()
        backward(reference, step)
        for parameter in reference.parameters():
            parameter.grad *= 0.5
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], msg=name)
    assert rule.steps == dict.fromkeys(model.state_dict(), 3)


def test_a_rule_of_pytorch_updates_inside_the_backward_pass():
    model, reference = Tiny(), Tiny()
    fused, rule = (TorchRule(each.named_parameters(), nadam) for each in (model, reference))
    for step in range(2):
        with fused.in_backward(1e-2):
            backward(model, step)
        backward(reference, step)
        rule.step(1e-2)
        rule.zero_grad()
    assert equal(model.state_dict(), reference.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("make", [nadam, lambda parameters: torch.optim.SGD(parameters, momentum=0.9)])
def test_a_rule_of_pytorch_goes_on_bit_for_bit_from_a_safetensors_file(tmp_path, make):
    model = Tiny()
    rule = TorchRule(model.named_parameters(), make)

    def go_on(model, rule):
        for step in range(2):
            rule.zero_grad()
            backward(model, step)
            rule.step(1e-2)

    go_on(model, rule)
    tensors, steps = rule.state_dict()
    save_file(tensors, tmp_path / "states.safetensors")
    resumed = copy.deepcopy(model)
    second = TorchRule(resumed.named_parameters(), make)
    second.load_state_dict(load_file(tmp_path / "states.safetensors"), steps)
    go_on(model, rule)
    go_on(resumed, second)
    assert equal(model.state_dict(), resumed.state_dict())
    assert rule.steps == second.steps
    with pytest.raises(CheckpointMismatch, match="of other parameters: other"):
        second.load_state_dict({}, {**steps, "other": 1})
    grown = TorchRule({"hidden.bias": resumed.hidden.bias, "new": nn.Parameter(torch.ones(2))}, make)
    grown.load_state_dict(tensors, steps, strict=False)
    assert grown.steps == {"hidden.bias": 2, "new": 0}


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            self.state[group["params"][0]]["number"] = 3.0
        super().step(closure)


def test_an_optimizer_whose_state_a_checkpoint_would_lose_is_refused_when_it_is_saved():
    weight = nn.Parameter(torch.ones(3))
    rule = TorchRule({"w": weight}, Counting)
    rule.state_dict()
    weight.grad = torch.ones(3)
    rule.step(1e-2)
    with pytest.raises(ConfigError, match="Counting keeps number, count as numbers"):
        rule.state_dict()


def test_the_example_of_a_loop_of_ones_own_learns(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.5 * losses[0]
