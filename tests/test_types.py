from __future__ import annotations

from dataclasses import replace

import pytest

from steplm.config import load_config
from steplm.planner.plan import plan as make_plan
from steplm.types import MemoryEstimate, MemoryTerm, Plan, from_json, to_json


@pytest.fixture
def plan() -> Plan:
    values = {"model": {"num_hidden_layers": 4}, "plan": {"num_stages": 2, "total_tokens": "10M"}, "pet": {"rank": 8}}
    return make_plan(load_config(values))


def _with_first_term(plan: Plan, **changes: object) -> Plan:
    stage = plan.stages[0]
    first, *others = stage.memory.terms
    memory = MemoryEstimate((replace(first, **changes), *others))  # type: ignore[arg-type]
    return replace(plan, stages=(replace(stage, memory=memory), *plan.stages[1:]))


def test_the_hash_covers_what_training_obeys_and_no_prose(plan: Plan) -> None:
    assert _with_first_term(plan, formula="in other words").hash == plan.hash
    assert _with_first_term(plan, num_bytes=1).hash == plan.hash, "bytes follow the devices"
    assert replace(plan, proved_optimal=not plan.proved_optimal).hash == plan.hash
    assert len(plan.hash) == 16
    others = [
        replace(plan, precision="fp32"),
        replace(plan, shape=replace(plan.shape, vocab_size=7)),
        replace(plan, stages=(replace(plan.stages[0], tokens=1), plan.stages[1])),
        replace(plan, stages=(plan.stages[0], replace(plan.stages[1], adapters=None))),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 1 + len(others)


def test_the_number_of_devices_changes_no_hash_but_what_each_holds() -> None:
    def made(*overrides: str) -> Plan:
        values = {"model": {"num_hidden_layers": 4}, "plan": {"num_stages": 2, "layers": [2, 2], "total_tokens": "10M"}}
        return make_plan(load_config(values, ["train.global_batch_size=24", *overrides]))

    alone, many, copies = (
        made(),
        made("distributed.world_size=8"),
        made("distributed.world_size=8", "distributed.shard_size=2"),
    )
    assert alone.hash == many.hash == copies.hash
    assert alone.peak_model_state_bytes > copies.peak_model_state_bytes > many.peak_model_state_bytes


def test_a_plan_of_before_there_were_several_devices_is_read(plan: Plan) -> None:
    old = to_json(plan)
    del old["shape"]["other_tensors"]
    old["shape"]["embedding_sizes"] = []
    read = from_json(Plan, old)
    assert read.layers == plan.layers
    assert read.shape.num_parameters() == plan.shape.num_parameters()


def test_bytes_by_kind_keep_adapters_apart_and_add_up_to_the_total() -> None:
    terms = [
        ("new_layers", "weights", 1),
        ("frozen_layers", "weights", 20),
        ("new_layers", "gradients", 300),
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
