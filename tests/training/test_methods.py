"""Every method by the one loop: planned bytes measured, and stopped anywhere it ends as the unbroken run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steplm.checkpoint import load_checkpoint
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import RunConfig
from steplm.errors import ConfigError
from steplm.planner.plan import plan
from steplm.training.metrics import read_metrics
from steplm.training.run import train
from steplm.types import to_json

Configure = Callable[..., RunConfig]
EqualRuns = Callable[[Path, Path], None]

RELORA = ("plan.num_stages=1", "method=relora", "pet.warm_start=0.25", "pet.restarts=2", "optim.schedule_over=run")
METHODS = {
    "lora": ("plan.num_stages=1", "method=lora"),
    "relora": (*RELORA, "pet.restart_keep=0.1"),
    "step with restarts": ("pet.restarts=1",),
    "step with one schedule": ("optim.schedule_over=run",),
    "badam": ("plan.num_stages=1", "method=badam", "optim.switch_steps=3"),
    "galore": ("plan.num_stages=1", "optim.name=galore", "optim.rank=4", "optim.update_proj_gap=3"),
    "apollo": ("plan.num_stages=1", "optim.name=apollo", "optim.rank=4", "optim.update_proj_gap=3"),
    "apollo_mini": ("plan.num_stages=1", "optim.name=apollo_mini", "optim.update_proj_gap=3"),
    "step with galore": ("optim.name=galore", "optim.rank=4", "optim.update_proj_gap=3"),
    "old layers under apollo_mini": (
        "plan.num_stages=3", "plan.layers=[2,1,1]", "method=growth", "optim.name=apollo_mini",
        "optim.low_rank_layers=old", "optim.update_proj_gap=3", "memory.master_weights=adamw",
    ),
    "old layers under galore, fused": (
        "method=growth", "optim.name=galore", "optim.rank=4", "optim.low_rank_layers=old",
        "memory.fused_backward=true", "optim.max_grad_norm=null",
    ),
    "galore, fused": (
        "plan.num_stages=1", "optim.name=galore", "optim.rank=4", "memory.fused_backward=true",
        "optim.max_grad_norm=null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_ends_as_the_unbroken_one(
    tiny_run: Configure, tmp_path: Path, assert_equal_runs: EqualRuns, method: str
) -> None:
    overrides = (*METHODS[method], "train.precision=bf16", "train.save_steps=1", "train.save_total_limit=99")
    train(tiny_run(tmp_path / "unbroken", *overrides))  # measures the planned bytes at every entrance
    losses = [event["loss"] for event in read_metrics(tmp_path / "unbroken" / "metrics.jsonl", "eval")]
    assert losses[-1] < losses[0]
    kept = complete_checkpoints(tmp_path / "unbroken" / "checkpoints")
    for number, stopped_at in enumerate((4, len(kept) // 2, len(kept) - 2)):
        run_dir = tmp_path / f"stopped-{number}"
        shutil.copytree(tmp_path / "unbroken", run_dir, ignore=shutil.ignore_patterns("export", "summary.json"))
        for path in kept[stopped_at:]:
            shutil.rmtree(run_dir / "checkpoints" / path.name)
        train(tiny_run(run_dir, *overrides))
        assert_equal_runs(run_dir, tmp_path / "unbroken")


def test_lora_from_scratch_leaves_every_layer_as_it_was_born(tiny_run: Configure, tmp_path: Path) -> None:
    train(tiny_run(tmp_path, *METHODS["lora"], "train.save_steps=1", "train.save_total_limit=99"))
    first, *_, last = (load_checkpoint(path) for path in complete_checkpoints(tmp_path / "checkpoints"))
    in_layers = [name for name in first.weights if ".layers." in name]
    assert in_layers
    assert all(torch.equal(first.weights[name], last.weights[name]) for name in in_layers)
    assert not torch.equal(first.weights["lm_head.weight"], last.weights["lm_head.weight"])
    assert all(bool(tensor.any()) for name, tensor in last.adapters.items() if name.endswith("lora_B"))


def test_relora_merges_at_every_restart_and_keeps_the_function(tiny_run: Configure, tmp_path: Path) -> None:
    train(tiny_run(tmp_path, *RELORA))
    restarts = read_metrics(tmp_path / "metrics.jsonl", "merge")
    assert len(restarts) == 4  # after the warm start, at two restarts, at the export
    for event in restarts:
        assert event["loss_after"] == pytest.approx(event["loss_before"], abs=2e-6)
    assert not read_metrics(tmp_path / "metrics.jsonl", "growth")


def test_relora_has_one_schedule_with_a_rise_after_every_restart(tiny_run: Configure, tmp_path: Path) -> None:
    overrides = (*RELORA, "plan.total_tokens=4096", "optim.warmup_ratio=0.2", "log.logging_steps=1")
    made = plan(tiny_run(tmp_path, *overrides))
    assert [stage.scheduled_tokens for stage in made.stages] == [4096] * 4
    assert [stage.schedule_start_tokens for stage in made.stages] == [0, 1024, 2048, 3072]
    train(tiny_run(tmp_path, *overrides))
    rates = [event["learning_rate"] for event in read_metrics(tmp_path / "metrics.jsonl", "train")]
    assert len(rates) == 64
    falls_then_rises = [
        step for step in range(1, 63) if rates[step] < rates[step - 1] and rates[step] < rates[step + 1]
    ]
    assert falls_then_rises == [16, 32, 48]
    assert rates[63] == min(rates[4:16] + rates[63:])


def test_a_restart_inside_a_stage_trains_the_same_new_layers(tiny_run: Configure, tmp_path: Path) -> None:
    first, second, third = plan(tiny_run(tmp_path, "pet.restarts=1", "plan.layers=[3,1]")).stages
    assert (second.num_new_layers, third.num_new_layers) == (1, 0)
    assert second.frozen_layers == third.frozen_layers
    assert len(third.frozen_layers) == 3
    assert second.trained_patterns == third.trained_patterns
    assert second.adapters == third.adapters
    assert third.schedule_start_tokens == second.tokens
    assert second.scheduled_tokens == third.scheduled_tokens
    assert first.adapters is None
    without = plan(tiny_run(tmp_path, "plan.layers=[3,1]"))
    assert second.tokens + third.tokens == without.stages[1].tokens


def test_badam_holds_one_layer_of_states_at_a_time(tiny_run: Configure, tmp_path: Path) -> None:
    made = plan(tiny_run(tmp_path, *METHODS["badam"], "train.precision=bf16"))
    layer, outer, depth = made.shape.layer_parameters, made.shape.outer_parameters, made.shape.num_hidden_layers
    assert made.peak_model_state_bytes == 16 * (layer + outer) + 2 * (depth - 1) * layer
    train(tiny_run(tmp_path, *METHODS["badam"], "train.precision=bf16"))


THAWED = METHODS["old layers under apollo_mini"]


def test_old_layers_that_are_trained_on_hold_four_bytes_a_parameter_and_a_little(
    tiny_run: Configure, tmp_path: Path
) -> None:
    made = plan(tiny_run(tmp_path, *THAWED, "train.precision=bf16"))
    shape = made.shape
    longer_sides = sum(max(linear.in_features, linear.out_features) for linear in shape.linears)
    norms = shape.layer_parameters - sum(linear.in_features * linear.out_features for linear in shape.linears)
    old = 4 * shape.layer_parameters + 12 * norms + 8 * longer_sides + 4 * len(shape.linears)
    whole = 16 * (shape.layer_parameters + shape.outer_parameters)
    states = [stage.memory.total_bytes for stage in made.stages]
    assert states == [whole + 16 * shape.layer_parameters, whole + 2 * old, whole + 3 * old]
    assert [stage.low_rank_layers for stage in made.stages] == [(), (0, 2), (0, 1, 3)]
    assert not any(stage.frozen_layers or stage.adapters for stage in made.stages)


def test_a_layer_that_grows_old_begins_its_states_anew_and_others_keep_theirs(
    tiny_run: Configure, tmp_path: Path
) -> None:
    train(tiny_run(tmp_path, *THAWED, "train.precision=bf16", "train.save_steps=1", "train.save_total_limit=99"))
    kept = complete_checkpoints(tmp_path / "checkpoints")
    ends = {path.name.partition("-")[0]: load_checkpoint(path) for path in kept if path.name.endswith("-end")}
    first = load_checkpoint(next(path for path in kept if path.name.startswith("stage3-")))
    of_stage = {name: end.state.progress.step for name, end in ends.items()}
    steps = {layer: first.state.optimizer_steps[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(4)}
    # Layers 0 and 3 were old in stage 2, layer 1 was new in it, layer 2 is new now.
    assert steps == {0: of_stage["stage2"] + 1, 1: 1, 2: 1, 3: of_stage["stage2"] + 1}
    # What AdamW updates before and after goes on: the head, and the norms of a layer that has grown old.
    assert first.state.optimizer_steps["lm_head.weight"] == of_stage["stage1"] + of_stage["stage2"] + 1
    assert first.state.optimizer_steps["model.layers.1.input_layernorm.weight"] == of_stage["stage2"] + 1


def test_the_planner_makes_later_stages_smaller_only_where_old_layers_take_fewer_bytes(
    tiny_run: Configure, tmp_path: Path
) -> None:
    thawed = [key for key in THAWED if not key.startswith(("plan.num_stages", "plan.layers"))]
    eight = ("model.num_hidden_layers=8", "train.precision=bf16", "plan.objective=model_state", *thawed)
    smaller, equal = (plan(tiny_run(tmp_path, *eight, *more)) for more in ((), ("optim.name=galore", "optim.rank=64")))
    assert smaller.layers[0] > smaller.layers[1]
    assert equal.layers == (4, 4)  # no side is longer than the rank: every layer has AdamW's states
    assert not any(stage.low_rank_layers for stage in equal.stages)


def test_where_all_layers_have_low_rank_states_the_plan_has_the_hash_that_it_had_before_there_was_a_choice(
    tiny_run: Configure, tmp_path: Path
) -> None:
    growing = ("method=growth", "optim.name=apollo_mini")
    for overrides, is_same in ((growing, True), ((*growing, "optim.low_rank_layers=old"), False)):
        made = plan(tiny_run(tmp_path, *overrides))
        without = replace(made, stages=tuple(replace(stage, low_rank_layers=()) for stage in made.stages))
        assert (made.hash == without.hash) is is_same


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=lora",), "plan.num_stages=1"),
        (("plan.num_stages=1", "method=lora", "pet.method=none"), "adapter method"),
        (("pet.warm_start=0.5",), "method=lora"),
        (("plan.num_stages=1", "pet.restarts=1"), "this run has none"),
        (("pet.method=none", "pet.restarts=1"), "this run has none"),
        (("method=badam",), "plan.num_stages=1"),
        (("plan.num_stages=1", "method=badam", "memory.frozen_weights=nf4"), "leaves no layer frozen"),
        (("plan.num_stages=1", "method=badam", "train.gradient_checkpointing=frozen"), "leaves no layer frozen"),
        (("optim.name=galore", "memory.optimizer_states=8bit"), "optimizer_states"),
        (("memory.master_weights=adamw", "train.precision=bf16"), "has none"),
        (("optim.low_rank_layers=old", "method=growth"), "under galore, apollo or apollo_mini"),
        (("optim.low_rank_layers=old", "optim.name=galore", "plan.num_stages=1"), "there before a growth"),
        (("optim.low_rank_layers=old", "optim.name=galore"), "freezes them"),
        (("pet.restarts=100",), "too few"),
    ],
)
def test_parts_of_different_methods_are_refused(
    tiny_run: Configure, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny_run(tmp_path, *overrides))


def test_another_optimizer_cannot_take_over_a_run(tiny_run: Configure, tmp_path: Path) -> None:
    from steplm.errors import CheckpointMismatch

    train(tiny_run(tmp_path))
    with pytest.raises(CheckpointMismatch, match=r"optim\.name"):
        train(tiny_run(tmp_path, "optim.name=apollo_mini"))


def test_other_layers_cannot_get_low_rank_states_in_the_middle_of_a_run(tiny_run: Configure, tmp_path: Path) -> None:
    from steplm.errors import CheckpointMismatch

    everywhere = ("method=growth", "optim.name=apollo_mini")
    train(tiny_run(tmp_path, *everywhere))
    with pytest.raises(CheckpointMismatch, match=r"optim\.low_rank_layers: all -> old"):
        train(tiny_run(tmp_path, *everywhere, "optim.low_rank_layers=old"))


def test_plans_survive_json(tiny_run: Configure, tmp_path: Path) -> None:
    from steplm.planner.plan import Plan
from steplm.types import from_json

    made = plan(tiny_run(tmp_path, *RELORA))
    assert from_json(Plan, to_json(made)) == made
    assert made.layers == (4,)
    assert len({made.hash_until(index) for index in range(1, 5)}) == 4
