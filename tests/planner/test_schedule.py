"""Who trains what, and when: what a schedule keeps, and what names it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.config import Method, RunConfig, load_config
from steplm.planner.methods import active_block
from steplm.planner.plan import Plan, plan, price_again
from steplm.schedule import Adapter, Entry, Frozen, Phase, Role, Schedule, Trained, trained_patterns
from steplm.types import LayerMap, LayerOrigin, from_json, to_json

TINY: dict[str, Any] = {
    "model": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4,
        "vocab_size": 50,
    },
    "plan": {"num_stages": 3, "total_tokens": 32 * 120},
    "pet": {"rank": 4},
    "optim": {"rank": 4, "switch_steps": 7},
    "train": {"sequence_length": 16, "per_device_train_batch_size": 2},
}  # fmt: skip
METHODS: dict[str, tuple[str, ...]] = {
    "vanilla": ("plan.num_stages=1",),
    "step": ("pet.restarts=1",),
    "growth": (),
    "thawed": ("optim.old_layers=apollo_mini", "optim.name=muon"),
    "lora": ("plan.num_stages=1",),
    "relora": ("plan.num_stages=1", "pet.restarts=2", "pet.warm_start=0.25"),
    "badam": ("plan.num_stages=1",),
}


def configured(*overrides: str) -> RunConfig:
    return load_config(TINY, overrides)


def plan_of(*overrides: str) -> Plan:
    return plan(configured(*overrides))


def by_method(name: str) -> Plan:
    return plan_of(f"method={name}", *METHODS[name])


def test_every_method_is_tried_here() -> None:
    assert METHODS.keys() == set(get_args(Method))


# --- as JSON ---


@st.composite
def roles(draw: st.DrawFn) -> Role:
    rule = draw(st.sampled_from(["adamw", "muon"]))
    targets = tuple(draw(st.lists(st.sampled_from(["q_proj", "up_proj"]), unique=True)))
    adapter = Adapter(draw(st.integers(1, 9)), draw(st.floats(0.5, 9)), targets, rule=rule)
    return draw(st.sampled_from([Trained(rule), Frozen(), adapter]))


@st.composite
def phases(draw: st.DrawFn) -> Phase:
    parents = st.lists(st.integers(0, 9), min_size=1, max_size=2).map(tuple)
    origins = st.builds(LayerOrigin, parents, st.booleans(), st.floats(0, 1))
    layer_map = draw(st.none() | st.builds(LayerMap, st.lists(origins, max_size=3).map(tuple)))
    kind = draw(st.sampled_from(["fresh", "grow", "merge", "go_on"]))
    operator = draw(st.none() | st.sampled_from(["stack", "random"]))
    layers = tuple(draw(st.lists(roles(), min_size=1, max_size=4)))
    index, stage, *tokens = (draw(st.integers(1, 10**12)) for _ in range(5))
    return Phase(index, stage, Entry(kind, layer_map, operator), layers, draw(roles()), *tokens)


@settings(max_examples=50, deadline=None)
@given(st.builds(Schedule, st.lists(phases(), max_size=3).map(tuple)))
def test_a_schedule_is_read_back_from_json_with_every_role_and_entry(schedule: Schedule) -> None:
    read = from_json(Schedule, to_json(schedule))
    assert read == schedule
    assert read.hash == schedule.hash


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_of_every_method_is_read_back_from_json_and_made_the_same_again(name: str) -> None:
    made = by_method(name)
    assert from_json(Plan, to_json(made)) == made == by_method(name)


# --- the hash ---


def test_schedules_that_begin_alike_share_the_hash_until_there() -> None:
    """So runs of a suite train what they have in common once."""
    rank4, rank2 = (plan_of(f"pet.rank={rank}", "plan.tokens_per_stage=[320,320,320]", "plan.total_tokens=null",
                            "plan.layers=[3,2,1]").schedule for rank in (4, 2))  # fmt: skip
    assert rank4.hash_until(1) == rank2.hash_until(1)
    assert rank4.hash_until(2) != rank2.hash_until(2)
    shorter = Schedule(rank4.phases[:2])
    assert shorter.hash == rank4.hash_until(2)
    assert rank4.hash == rank4.hash_until(3) != rank4.hash_until(2)
    restarted = plan_of("pet.restarts=1").schedule
    assert len({restarted.hash_until(count) for count in range(1, 6)}) == len(restarted.phases) == 5


def test_prices_change_no_hash_and_no_schedule() -> None:
    """Another micro-batch, other formats of what is held, another number of devices, another budget."""
    batch = ("train.global_batch_size=8", "plan.layers=[3,2,1]")
    made = plan_of(*batch)
    for override in (
        "train.per_device_train_batch_size=1", "memory.optimizer_states=8bit", "memory.frozen_weights=nf4",
        "train.gradient_checkpointing=true", "train.precision=fp32", "distributed.world_size=4",
    ):  # fmt: skip
        other = plan_of(*batch, override)
        assert other.peak_bytes != made.peak_bytes, override
        assert (other.schedule, other.schedule.hash) == (made.schedule, made.schedule.hash), override


def test_a_schedule_that_has_begun_keeps_its_layers_at_todays_prices() -> None:
    begun = plan_of("plan.layers=[2,2,2]", "train.global_batch_size=8")
    today = configured("train.per_device_train_batch_size=1", "train.global_batch_size=8")
    again = price_again(today, begun.shape, begun)
    assert again.schedule == begun.schedule != plan(today).schedule
    assert again.costs == plan_of("plan.layers=[2,2,2]", "train.global_batch_size=8",
                                  "train.per_device_train_batch_size=1").costs  # fmt: skip


# --- phases ---


@pytest.mark.parametrize("name", METHODS)
def test_phases_are_numbered_through_and_stages_are_made_of_them(name: str) -> None:
    made = by_method(name)
    schedule = made.schedule
    assert [phase.index for phase in schedule.phases] == [*range(1, len(schedule.phases) + 1)]
    assert [stage.index for stage in made.stages] == [*range(1, made.num_stages + 1)]
    assert tuple(phase for stage in made.stages for phase in stage.phases) == schedule.phases
    assert sum(phase.tokens for phase in schedule.phases) == schedule.total_tokens == 32 * 120
    assert all(phase.tokens % 32 == 0 < phase.tokens for phase in schedule.phases)
    assert sum(schedule.layers) == 6
    for stage in schedule.stages:
        assert [phase.entry.kind for phase in stage].count("grow") == (stage[0].stage > 1)
        depths = {phase.num_hidden_layers for phase in stage}
        assert len(depths) == 1
        seen = 0
        for phase in stage:  # the schedule of the learning rate runs over the stage
            assert phase.schedule_start_tokens == seen
            assert phase.scheduled_tokens == stage[0].scheduled_tokens
            seen += phase.tokens


def test_one_schedule_over_the_run_goes_on_where_the_phase_before_stopped() -> None:
    schedule = plan_of("optim.schedule_over=run", "pet.restarts=1").schedule
    seen = 0
    for phase in schedule.phases:
        assert (phase.schedule_start_tokens, phase.scheduled_tokens) == (seen, schedule.total_tokens)
        seen += phase.tokens


def test_restarts_of_adapters_are_phases_of_one_stage_that_merge() -> None:
    made = plan_of("pet.restarts=2")
    kinds = [[phase.entry.kind for phase in stage] for stage in made.schedule.stages]
    assert kinds == [["fresh"], ["grow", "merge", "merge"], ["grow", "merge", "merge"]]
    for stage in made.schedule.stages:
        assert len({phase.layers for phase in stage}) == 1, "who trains is the same after a restart"
    assert [phase.entry.warms_up_again for phase in made.schedule.phases] == [False, *[True] * 6]


def test_relora_trains_all_layers_and_then_adapters_on_all() -> None:
    warm, *rounds = by_method("relora").schedule.phases
    assert (set(warm.layers), warm.entry) == ({Trained()}, Entry("fresh"))
    assert [phase.entry.kind for phase in rounds] == ["merge"] * 3
    assert all(len(phase.adapters) == 6 for phase in rounds)
    assert warm.tokens == 30 * 32


def test_badam_trains_each_layer_once_in_every_pass() -> None:
    made = by_method("badam")
    turns = made.schedule.phases
    assert [phase.tokens for phase in turns[:-1]] == [7 * 32] * 17
    assert turns[-1].tokens == 32
    assert [phase.trained_layers for phase in turns] == [
        (active_block(turn, num_blocks=6, seed=0),) for turn in range(18)
    ]
    for first in (0, 6, 12):
        assert sorted(phase.trained_layers[0] for phase in turns[first : first + 6]) == [*range(6)]
    assert {phase.entry.kind for phase in turns[1:]} == {"go_on"}
    assert {phase.embeddings_and_head for phase in turns} == {Trained()}


def test_thawed_trains_old_layers_by_their_own_rule() -> None:
    first, second, _ = by_method("thawed").schedule.phases
    assert set(first.layers) == {Trained("muon")}
    for index, role in enumerate(second.layers):
        assert role == Trained("muon" if index in second.new_layers else "apollo_mini")


def test_phases_that_hold_the_same_share_one_cost_and_one_row() -> None:
    made = by_method("badam")
    assert len(made.costs) == 7 < len(made.schedule.phases), "each layer's, and the first turn's"
    (stage,) = made.stages
    assert len(stage.spans) <= 6
    assert sum(len(span.phases) for span in stage.spans) == len(made.schedule.phases)
    assert made.cost(stage.highest_phase).device_bytes == stage.device_bytes == made.peak_bytes


@pytest.mark.parametrize("name", METHODS)
def test_the_patterns_of_a_phase_name_its_trained_tensors_and_no_other(name: str) -> None:
    made = by_method(name)
    for phase in made.schedule.phases:
        patterns = trained_patterns(phase, made.shape)

        def is_trained(name: str, patterns: tuple[str, ...] = patterns) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

        for layer, role in enumerate(phase.layers):
            prefix = f"model.layers.{layer}.self_attn.q_proj"
            assert is_trained(f"{prefix}.weight") == isinstance(role, Trained)
            if isinstance(role, Adapter):
                assert is_trained(f"{prefix}.lora_A")
        assert is_trained("lm_head.weight") == isinstance(phase.embeddings_and_head, Trained)


def test_the_backward_pass_goes_down_to_the_lowest_that_is_trained() -> None:
    def unreached(layers: list[Role], outside: Role) -> int:
        return Phase(1, 1, Entry("fresh"), tuple(layers), outside, 1, 1, 0).num_layers_without_backward

    adapter = Adapter(1, 1.0, ("q_proj",))
    assert unreached([Frozen(), Frozen(), Trained(), Frozen()], Frozen()) == 2
    assert unreached([Frozen(), adapter, Trained(), Frozen()], Frozen()) == 1
    assert unreached([Frozen(), Frozen()], Frozen()) == 2
    assert unreached([Frozen(), Frozen(), Trained()], Trained()) == 0, "embeddings are below all layers"
    assert unreached([Frozen(), Frozen(), Trained()], adapter) == 0
