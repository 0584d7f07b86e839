"""Every method by the one loop: planned bytes measured, and stopped anywhere it ends as the unbroken run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from steplm.checkpoint import load_checkpoint
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import RunConfig
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.planner.plan import Plan, plan
from steplm.schedule import Phase, Trained, trained_patterns
from steplm.training.metrics import read_metrics
from steplm.training.run import train
from steplm.types import from_json, to_json

Configure = Callable[..., RunConfig]
EqualRuns = Callable[[Path, Path], None]

FUSED = ("memory.fused_backward=true", "optim.max_grad_norm=null")
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
        "plan.num_stages=3", "plan.layers=[2,1,1]", "method=thawed", "optim.old_layers=apollo_mini",
        "optim.update_proj_gap=3", "memory.master_weights=adamw",
    ),
    "old layers under galore, fused": ("method=thawed", "optim.old_layers=galore", "optim.rank=4", *FUSED),
    "galore, fused": ("plan.num_stages=1", "optim.name=galore", "optim.rank=4", *FUSED),
    "muon": ("optim.name=muon",),
    "muon, 8 bits and no master weights": (
        "plan.num_stages=1", "optim.name=muon", "memory.optimizer_states=8bit", "memory.master_weights=false",
    ),
    "muon, fused": ("plan.num_stages=1", "optim.name=muon", *FUSED),
    "scale": ("plan.num_stages=1", "optim.name=scale"),
    "growth under scale, old layers under muon": ("method=thawed", "optim.name=scale", "optim.old_layers=muon"),
    "8-bit master weights": ("memory.master_weights=8bit",),
    "muon on adapters": ("pet.rule=muon", "pet.restarts=1"),
    "badam with muon": ("plan.num_stages=1", "method=badam", "optim.switch_steps=3", "optim.name=muon"),
    "badam, fused": ("plan.num_stages=1", "method=badam", "optim.switch_steps=3", *FUSED),
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
    # BAdam: between two turns of 3 steps, and between two passes of 12.
    for stopped_at in (3, 6, 12) if method == "badam" else (4, len(kept) // 2, len(kept) - 2):
        run_dir = tmp_path / f"stopped-{stopped_at}"
        shutil.copytree(tmp_path / "unbroken", run_dir, ignore=shutil.ignore_patterns("export", "summary.json"))
        for path in kept[stopped_at:]:
            shutil.rmtree(run_dir / "checkpoints" / path.name)
        train(tiny_run(run_dir, *overrides, "train.save_steps=99"))  # saving less often is faster
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
    phases = plan(tiny_run(tmp_path, *overrides)).schedule.phases
    assert [phase.scheduled_tokens for phase in phases] == [4096] * 4
    assert [phase.schedule_start_tokens for phase in phases] == [0, 1024, 2048, 3072]
    train(tiny_run(tmp_path, *overrides))
    rates = [event["learning_rate"] for event in read_metrics(tmp_path / "metrics.jsonl", "train")]
    assert len(rates) == 64
    falls_then_rises = [
        step for step in range(1, 63) if rates[step] < rates[step - 1] and rates[step] < rates[step + 1]
    ]
    assert falls_then_rises == [16, 32, 48]
    assert rates[63] == min(rates[4:16] + rates[63:])


def test_a_restart_writes_no_checkpoint_unless_one_is_due(
    tiny_run: Configure, tmp_path: Path, assert_equal_runs: EqualRuns
) -> None:
    overrides = (*RELORA, "pet.restart_keep=0.1", "train.precision=bf16", "train.save_total_limit=99")
    train(tiny_run(tmp_path / "seldom", *overrides, "train.save_steps=6"))
    made = plan(tiny_run(tmp_path, *overrides))
    assert [phase.tokens // 64 for phase in made.schedule.phases] == [4, 4, 4, 4]  # restarts after steps 4, 8, 12
    names = [path.name for path in complete_checkpoints(tmp_path / "seldom" / "checkpoints")]
    assert names == ["stage1-step000006", "stage1-step000012", "stage1-end"]
    # Entered from memory or from the disk, a phase is the same.
    often = tiny_run(tmp_path / "often", *overrides, "train.save_steps=1")
    train(often)
    shutil.rmtree(tmp_path / "often" / "export")
    (tmp_path / "often" / "summary.json").unlink()
    for path in complete_checkpoints(tmp_path / "often" / "checkpoints")[8:]:
        shutil.rmtree(path)
    train(often)
    assert_equal_runs(tmp_path / "often", tmp_path / "seldom")


@pytest.mark.parametrize("method", ["relora", "step with restarts", "badam"])
def test_the_log_counts_growths_as_stages_and_steps_within_them(
    tiny_run: Configure, tmp_path: Path, method: str
) -> None:
    config = tiny_run(tmp_path, *METHODS[method])
    train(config)
    made = plan(config)
    steps = [(event["stage"], event["step"]) for event in read_metrics(tmp_path / "metrics.jsonl", "train")]
    expected = [(stage.index, 1 + n) for stage in made.stages for n in range(stage.tokens // config.step_tokens)]
    assert steps == expected
    assert len(read_metrics(tmp_path / "metrics.jsonl", "stage_end")) == made.num_stages
    assert len(made.schedule.phases) > made.num_stages


def test_a_restart_inside_a_stage_trains_the_same_new_layers(tiny_run: Configure, tmp_path: Path) -> None:
    made = plan(tiny_run(tmp_path, "pet.restarts=1", "plan.layers=[3,1]"))
    first, second, third = made.schedule.phases
    assert [(phase.stage, phase.entry.kind) for phase in (first, second, third)] == [
        (1, "fresh"), (2, "grow"), (2, "merge"),
    ]  # fmt: skip
    assert (len(second.new_layers), len(third.new_layers)) == (1, 0)
    assert second.frozen_layers == third.frozen_layers
    assert len(third.frozen_layers) == 3
    assert trained_patterns(second, made.shape) == trained_patterns(third, made.shape)
    assert second.adapters == third.adapters
    assert third.schedule_start_tokens == second.tokens
    assert second.scheduled_tokens == third.scheduled_tokens
    assert not first.adapters
    without = plan(tiny_run(tmp_path, "plan.layers=[3,1]"))
    assert second.tokens + third.tokens == without.stages[1].tokens


def test_badam_holds_one_layer_of_states_at_a_time(tiny_run: Configure, tmp_path: Path) -> None:
    made = plan(tiny_run(tmp_path, *METHODS["badam"], "train.precision=bf16"))
    layer, outer, depth = made.shape.layer_parameters, made.shape.outer_parameters, made.shape.num_hidden_layers
    assert made.peak_model_state_bytes == 16 * (layer + outer) + 2 * (depth - 1) * layer
    train(tiny_run(tmp_path, *METHODS["badam"], "train.precision=bf16"))


def test_badam_trains_one_layer_after_the_other_and_each_once_in_a_pass(tiny_run: Configure, tmp_path: Path) -> None:
    made = plan(tiny_run(tmp_path, *METHODS["badam"], "plan.total_tokens=1792"))  # 28 steps: 9 turns of 3, and one of 1
    phases = made.schedule.phases
    assert [phase.tokens // 64 for phase in phases] == [3] * 9 + [1]
    assert [phase.entry.kind for phase in phases] == ["fresh"] + ["go_on"] * 9
    turns = [phase.trained_layers for phase in phases]
    assert all(len(layers) == 1 for layers in turns)
    assert sorted(turns[:4]) == sorted(turns[4:8]) == [(0,), (1,), (2,), (3,)]
    # One schedule over the stage, without a new rise at each turn.
    assert [phase.schedule_start_tokens for phase in phases] == [192 * turn for turn in range(10)]
    assert not any(phase.entry.warms_up_again for phase in phases)


def test_in_a_run_of_badam_only_the_layer_whose_turn_it_is_moves(tiny_run: Configure, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, *METHODS["badam"], "train.save_steps=1", "train.save_total_limit=99")
    train(config)
    phases = plan(config).schedule.phases
    kept = [load_checkpoint(path) for path in complete_checkpoints(tmp_path / "checkpoints")]
    for before, after in pairwise(kept):
        moved = {name for name in after.weights if not torch.equal(before.weights[name], after.weights[name])}
        layers = {int(name.split(".")[2]) for name in moved if ".layers." in name}
        assert layers == set(phases[after.state.progress.phase_index - 1].trained_layers)
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= moved
        turn_steps = after.state.progress.phase_step
        of_layers = {count for name, count in after.state.optimizer_steps.items() if ".layers." in name}
        assert of_layers == {turn_steps}  # states begin anew with the turn
        assert after.state.optimizer_steps["lm_head.weight"] == after.state.progress.step  # and these go on


THAWED = METHODS["old layers under apollo_mini"]


def _trained_by(phase: Phase, rule: str) -> tuple[int, ...]:
    return tuple(index for index, role in enumerate(phase.layers) if role == Trained(rule))


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
    phases = made.schedule.phases
    assert [_trained_by(phase, "apollo_mini") for phase in phases] == [(), (0, 2), (0, 1, 3)]
    assert not any(phase.frozen_layers or phase.has_adapters for phase in phases)


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
    galore = ("optim.old_layers=galore", "optim.rank=64")
    smaller, equal = (plan(tiny_run(tmp_path, *eight, *more)) for more in ((), galore))
    assert smaller.layers[0] > smaller.layers[1]
    assert equal.layers == (4, 4)  # no side is longer than the rank: every layer has AdamW's states
    all_by_adamw = plan(tiny_run(tmp_path, "method=growth", *eight[:3], "plan.layers=[4,4]"))
    assert [stage.memory.by_kind() for stage in equal.stages] == [
        stage.memory.by_kind() for stage in all_by_adamw.stages
    ]


def test_schedules_say_which_rule_trains_which_layer_and_nothing_of_how_it_was_asked_for(
    tiny_run: Configure, tmp_path: Path
) -> None:
    everywhere, old_alone, none, by_adamw = (
        plan(tiny_run(tmp_path, "plan.layers=[2,2]", *overrides)).schedule
        for overrides in (
            ("method=growth", "optim.name=apollo_mini"),
            ("method=thawed", "optim.old_layers=apollo_mini"),
            ("method=growth",),
            ("method=thawed", "optim.old_layers=adamw"),
        )
    )
    assert len({everywhere.hash, old_alone.hash, none.hash}) == 3
    assert old_alone.hash_until(1) == none.hash_until(1)  # there are no old layers yet
    assert by_adamw == none


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=lora",), r"plan\.num_stages=1"),
        (("plan.num_stages=1", "method=lora", "pet.method=none"), "method=lora needs adapters"),
        (("plan.num_stages=1", "method=lora", "pet.restarts=1"), r"does not read pet\.restarts.*step, relora"),
        (("plan.num_stages=1", "method=relora"), "needs pet.restarts of 1 or more, or pet.warm_start"),
        (("pet.warm_start=0.5",), r"method=step does not read pet\.warm_start.* relora"),
        (("plan.num_stages=1", "pet.restarts=1"), "this run has none"),
        (("pet.method=none", "pet.restarts=1"), "this run has none"),
        (("method=badam",), r"plan\.num_stages=1"),
        (("method=vanilla",), r"plan\.num_stages=1"),
        (("plan.num_stages=1", "method=badam", "memory.frozen_weights=nf4"), "badam trains them again"),
        (("plan.num_stages=1", "method=badam", "memory.offload_frozen=true"), "badam trains them again"),
        (("plan.num_stages=1", "method=badam", "train.gradient_checkpointing=frozen"), "badam trains them again"),
        (("plan.num_stages=1", "method=badam", "train.gradient_checkpointing=new"), "badam trains them again"),
        (("method=growth", "memory.frozen_weights=nf4"), "growth freezes none"),
        (("method=growth", "memory.offload_frozen=true"), "growth freezes none"),
        (("method=growth", "train.gradient_checkpointing=frozen"), "growth freezes none"),
        (("optim.name=galore", "memory.optimizer_states=8bit"), r"memory\.optimizer_states=8bit is not for it"),
        (("optim.name=apollo", "train.precision=bf16", "memory.master_weights=8bit"), "true or false"),
        (("memory.master_weights=adamw", "train.precision=bf16"), "adamw is the only one"),
        (("memory.master_weights=8bit", "train.precision=fp32"), r"train\.precision=fp32 has none"),
        (("method=thawed",), r"set optim\.old_layers"),
        (("optim.old_layers=galore",), r"method=step does not read optim\.old_layers.*thawed"),
        (("method=growth", "optim.old_layers=galore"), r"method=growth does not read optim\.old_layers.*thawed"),
        (("pet.restarts=100",), "too few"),
        (("pet.rule=muon", "pet.restarts=1", "pet.restart_keep=0.1"), r"pet\.restart_keep"),  # it has no Adam moments
    ],
)
def test_parts_of_different_methods_are_refused(
    tiny_run: Configure, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny_run(tmp_path, *overrides))


def test_another_optimizer_cannot_take_over_a_run(tiny_run: Configure, trained: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointMismatch, match=r"optim\.name"):
        train(tiny_run(trained(), "optim.name=apollo_mini"))


def test_old_layers_cannot_get_another_rule_in_the_middle_of_a_run(
    tiny_run: Configure, trained: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointMismatch, match=r"method: growth -> thawed, optim\.old_layers: None -> apollo_mini"):
        train(tiny_run(trained("method=growth"), "method=thawed", "optim.old_layers=apollo_mini"))


def test_plans_survive_json(tiny_run: Configure, tmp_path: Path) -> None:
    made = plan(tiny_run(tmp_path, *RELORA))
    assert from_json(Plan, to_json(made)) == made
    assert made.layers == (4,)
    assert len({made.schedule.hash_until(index) for index in range(1, 5)}) == 4
