"""Moments of new layers: zero, or made of those of their parents as the weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steplm.checkpoint import Checkpoint, load_checkpoint
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import RunConfig
from steplm.training import enter as enter_module
from steplm.training import run as run_module
from steplm.training.assemble import Assembled
from steplm.training.run import train

Configure = Callable[..., RunConfig]
Q, NORM = "self_attn.q_proj.weight", "input_layernorm.weight"


def _states_after_growth(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[Checkpoint, dict[str, dict[str, torch.Tensor]], dict[str, int]]:
    """The end of stage 1, and states and steps at the entrance of stage 2."""
    found = {}

    def at_entrance(run, phase, start, assembled: Assembled) -> None:  # type: ignore[no-untyped-def]
        found[phase.stage] = (
            {name: {key: s.clone() for key, s in of.items()} for name, of in assembled.rules.state_tensors().items()},
            dict(assembled.rules.steps),
        )
        enter_module.check_entrance(run, phase, start, assembled)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "check_entrance", at_entrance)
        train(config)
    first = next(path for path in complete_checkpoints(config.run_dir / "checkpoints") if path.name == "stage1-end")
    return load_checkpoint(first), *found[2]


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_new_layer_begins_with_the_mean_of_its_parents_moments(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    config = tiny_run(
        tmp_path, f"optim.name={rule}", "growth.optimizer_states=parents", "plan.layers=[3,1]", "train.precision=bf16"
    )
    before, states, steps = _states_after_growth(config, monkeypatch)
    key = "momentum_buffer" if rule == "muon" else "exp_avg"
    for below, state in ((Q, key), (NORM, "exp_avg_sq")):  # layer 2 is new, between 1 and what was 2
        lower, upper = (before.optimizer[f"model.layers.{layer}.{below}.{state}"] for layer in (1, 2))
        new = states[f"model.layers.2.{below}"]
        torch.testing.assert_close(new[state], (lower + upper) / 2)
        assert steps[f"model.layers.2.{below}"] == before.state.progress.step
    assert torch.equal(
        states[f"model.layers.2.{Q}"]["master"].bfloat16().float(), states[f"model.layers.2.{Q}"]["master"]
    )


@pytest.mark.parametrize("overrides", [("memory.optimizer_states=8bit",), ("growth.operator=random",), ()])
def test_otherwise_it_begins_with_none(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    asked = ("growth.optimizer_states=parents",) if overrides else ()
    config = tiny_run(tmp_path, *overrides, *asked, "plan.layers=[3,1]", "train.precision=bf16")
    _, states, steps = _states_after_growth(config, monkeypatch)
    new = config.growth.operator
    assert new in ("interpolation_mean", "random")
    assert steps[f"model.layers.2.{Q}"] == 0
    if "exp_avg_scale" in states[f"model.layers.2.{Q}"]:
        assert not states[f"model.layers.2.{Q}"]["exp_avg_scale"].any()
    else:
        assert not states[f"model.layers.2.{Q}"]["exp_avg"].any()
