"""Bytes and seconds of a step on several devices: by hand, and what must not change them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steplm.config import RunConfig, load_config
from steplm.cost.devices import DEVICES, Device
from steplm.cost.traffic import LINK_SHARE, StepEstimate, Traffic, estimate_step, step_traffic
from steplm.planner.plan import plan

# P_layer: q, k, v and o 8 x 8, gate and up 16 x 8, down 8 x 16, two norms of 8. Outside: twice 32 x 8, and a norm of 8.
P_LAYER, P_OUTER = 4 * 64 + 3 * 128 + 16, 2 * 256 + 8
RANK = 4
E = 4 * (RANK * 8 + 8 * RANK) + 2 * (RANK * 8 + 16 * RANK) + (RANK * 16 + 8 * RANK)  # adapters of a layer


def configure(*overrides: str) -> RunConfig:
    values: dict[str, Any] = {
        "model": {
            "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 5,
            "vocab_size": 32, "max_position_embeddings": 64,
        },
        "plan": {"num_stages": 2, "layers": [3, 2], "total_tokens": 10**6},
        "pet": {"rank": RANK},
        "train": {"sequence_length": 16, "per_device_train_batch_size": 2},
    }  # fmt: skip
    return load_config(values, overrides)


def traffic(stage: int, *overrides: str) -> Traffic:
    config = configure(*overrides)
    made = plan(config)
    (phase,) = made.schedule.stages[stage - 1]
    return step_traffic(config, made.shape, phase)


def test_a_ring_sends_all_but_its_own_part() -> None:
    first, second = (traffic(stage, "distributed.world_size=4") for stage in (1, 2))
    assert first == Traffic(2 * (3 * P_LAYER + P_OUTER) * 2 * 3 // 4, (3 * P_LAYER + P_OUTER) * 4 * 3 // 4, 0)
    whole = 5 * P_LAYER + 3 * E + P_OUTER
    assert second == Traffic(2 * whole * 2 * 3 // 4, (2 * P_LAYER + 3 * E + P_OUTER) * 4 * 3 // 4, 0)


def test_copies_reduce_what_the_shards_have_left_twice_over() -> None:
    found = traffic(1, "distributed.world_size=16", "distributed.shard_size=4")
    of_a_shard = 4 * (3 * P_LAYER + P_OUTER) // 4
    assert found == replace(traffic(1, "distributed.world_size=4"), all_reduce=2 * of_a_shard * 3 // 4)


def test_a_copy_on_each_device_gathers_nothing() -> None:
    found = traffic(1, "distributed.world_size=4", "distributed.shard_size=1")
    assert found == Traffic(0, 0, 2 * 3 * (3 * P_LAYER + P_OUTER) * 4 // 4)


def test_one_device_sends_nothing_and_micro_batches_send_each() -> None:
    assert traffic(2) == Traffic(0, 0, 0)
    once, thrice = (traffic(2, "distributed.world_size=4", f"train.gradient_accumulation_steps={n}") for n in (1, 3))
    assert thrice == Traffic(3 * once.all_gather, 3 * once.reduce_scatter, 0)
    same = traffic(2, "distributed.world_size=4", "train.global_batch_size=24")
    assert same == thrice


def test_layers_that_no_gradient_reaches_are_gathered_once_but_for_the_highest() -> None:
    silent = ("pet.method=none", "plan.train_embeddings=first_stage", "plan.layers=[4,1]", "distributed.world_size=4")
    config = configure(*silent)
    made = plan(config)
    unreached = made.schedule.phases[1].num_layers_without_backward
    assert unreached == min(made.schedule.phases[1].trained_layers) == 3
    gathers = 5 + 5 - (unreached - 1)
    assert traffic(2, *silent).all_gather == (gathers * P_LAYER + 2 * P_OUTER) * 2 * 3 // 4
    assert traffic(2, *silent).reduce_scatter == P_LAYER * 4 * 3 // 4


def test_muon_sends_each_matrix_to_the_rank_that_orthogonalizes_it_and_back() -> None:
    muon, adamw = (traffic(1, "distributed.world_size=4", *rule) for rule in (("optim.name=muon",), ()))
    matrices = 3 * (4 * 64 + 3 * 128)
    width = 4  # of a number in Newton–Schulz on a CPU
    assert muon == replace(adamw, update=2 * width * matrices // 4 * 3 // 4)
    assert traffic(1, "optim.name=muon").update == 0


DEVICE = Device("", 0, 1e9, 1e8, 0, 0, "", node_bandwidth=1e6, network_bandwidth=1e4)


def steps(config: RunConfig, **options: float) -> list[StepEstimate]:
    made = plan(config)
    return [estimate_step(config, made.shape, phase, DEVICE, **options) for phase in made.schedule.phases]


def seconds(*overrides: str) -> float:
    return steps(configure(*overrides))[0].communication_seconds


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    in_node = traffic(1, "distributed.world_size=8").total
    assert seconds("distributed.world_size=8") == pytest.approx(in_node / 1e6 / LINK_SHARE)
    across = traffic(1, "distributed.world_size=16").total
    assert seconds("distributed.world_size=16") == pytest.approx(across / 8e4 / LINK_SHARE), "eight cards a node"
    hybrid = ("distributed.world_size=16", "distributed.shard_size=8")
    sent = traffic(1, *hybrid)
    expected = (sent.all_gather + sent.reduce_scatter) / 1e6 + sent.all_reduce / 1e4  # each its own card
    assert seconds(*hybrid) == pytest.approx(expected / LINK_SHARE)


def test_a_step_takes_its_operations_at_the_share_of_the_peak_and_its_bounds_hold() -> None:
    config = configure("distributed.world_size=4", "train.gradient_checkpointing=true")
    made = plan(config)
    first, second = steps(config, utilization=0.5)
    without = steps(configure("distributed.world_size=4"), utilization=0.5)[0]
    assert without.flops == made.stages[0].flops_per_token * config.step_tokens // 4
    layers = sum(linear.num_parameters for linear in made.shape.linears)
    again = 3 * (2 * layers + 4 * 16 * 8) * config.step_tokens // 4
    assert first.flops - without.flops == again
    for step in (first, second):
        assert step.compute_seconds == pytest.approx(step.flops / 0.5e9)
        assert step.least_seconds == max(step.compute_seconds, step.communication_seconds)
        assert step.most_seconds == step.compute_seconds + step.communication_seconds
    assert first.num_steps * config.step_tokens == made.stages[0].tokens


def test_rates_of_the_devices_are_of_one_direction_and_dense() -> None:
    assert DEVICES["h100"].flops("bf16") == 989e12
    assert DEVICES["h100"].node_bandwidth == 900e9 / 2
    for device in DEVICES.values():
        if device.network_bandwidth is not None:
            assert device.node_bandwidth is not None
            assert device.network_bandwidth < device.node_bandwidth
