from __future__ import annotations

from dataclasses import replace

import pytest

from steplm.config import load_config
from steplm.planner.plan import Plan
from steplm.planner.plan import plan as make_plan
from steplm.schedule import Frozen, Phase, Schedule
from steplm.types import MemoryEstimate, MemoryTerm


@pytest.fixture
def plan() -> Plan:
    values = {"model": {"num_hidden_layers": 4}, "plan": {"num_stages": 2, "total_tokens": "10M"}, "pet": {"rank": 8}}
    return make_plan(load_config(values))


def _with_phase(plan: Plan, index: int, **changes: object) -> Schedule:
    phases: list[Phase] = [*plan.schedule.phases]
    phases[index - 1] = replace(phases[index - 1], **changes)  # type: ignore[arg-type]
    return Schedule(tuple(phases))


def test_the_hash_covers_all_that_training_obeys(plan: Plan) -> None:
    second = plan.schedule.phases[1]
    (kept,) = {role for role in second.layers if role in second.adapters.values()}
    layers = tuple(replace(kept, alpha=1.0) if role is kept else role for role in second.layers)
    others = [
        _with_phase(plan, 1, tokens=1),
        _with_phase(plan, 1, scheduled_tokens=1),
        _with_phase(plan, 2, schedule_start_tokens=1),
        _with_phase(plan, 2, layers=layers),
        _with_phase(plan, 2, embeddings_and_head=Frozen()),
        _with_phase(plan, 2, entry=replace(second.entry, operator="stack")),
        Schedule(plan.schedule.phases[:1]),
    ]
    assert len(plan.schedule.hash) == 16
    assert len({plan.schedule.hash, *(other.hash for other in others)}) == 1 + len(others)


def test_the_number_of_devices_changes_no_hash_but_what_each_holds() -> None:
    def made(*overrides: str) -> Plan:
        values = {"model": {"num_hidden_layers": 4}, "plan": {"num_stages": 2, "layers": [2, 2], "total_tokens": "10M"}}
        return make_plan(load_config(values, ["train.global_batch_size=24", *overrides]))

    alone, many, copies = (
        made(),
        made("distributed.world_size=8"),
        made("distributed.world_size=8", "distributed.shard_size=2"),
    )
    assert alone.schedule.hash == many.schedule.hash == copies.schedule.hash
    assert alone.peak_model_state_bytes > copies.peak_model_state_bytes > many.peak_model_state_bytes


def test_bytes_by_kind_keep_adapters_apart_and_add_up_to_the_total() -> None:
    terms = [
        ("trained_layers", "weights", 1),
        ("frozen_layers", "weights", 20),
        ("trained_layers", "gradients", 300),
        ("head", "optimizer", 4_000),
        ("adapters", "weights", 50_000),
        ("adapters", "optimizer", 600_000),
    ]
    estimate = MemoryEstimate(
        tuple(MemoryTerm(component, kind, 2 * count, "", count) for component, kind, count in terms)
    )
    by_kind = estimate.by_kind()
    assert by_kind == {
        "weights": 42,
        "gradients": 600,
        "optimizer": 8_000,
        "adapters": 1_300_000,
        "total": 1_308_642,
    }
    assert sum(by_kind.values()) == 2 * by_kind["total"]
