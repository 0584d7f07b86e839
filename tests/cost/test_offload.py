"""What an optimizer in host memory takes there, and sends over the bus: by hand, and beside the run without it."""

from __future__ import annotations

from typing import Any

import pytest

from steplm.config import RunConfig, load_config
from steplm.cost.formats import muon_product_bytes
from steplm.errors import ConfigError, PlanInfeasible
from steplm.planner.fit import fit
from steplm.planner.plan import Plan, plan
from steplm.types import HOST, HOST_GRADIENTS, HOST_KINDS, HOST_OPTIMIZER, HOST_WEIGHTS

OFFLOAD = "memory.offload_optimizer=true"
D, F, V, LAYERS = 64, 176, 500, 3
MATRICES = 4 * D * D + 3 * D * F
LAYER = MATRICES + 2 * D
WITH_WEIGHTS = (OFFLOAD, "memory.offload_weights=true")
TRAINED = LAYERS * LAYER + 2 * V * D + D


def configure(*overrides: str) -> RunConfig:
    values: dict[str, Any] = {
        "model": {
            "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "vocab_size": V, "max_position_embeddings": 512,
        },
        "plan": {"num_stages": 1, "total_tokens": 100_000},
        "pet": {"rank": 8},
        "train": {"sequence_length": 64, "per_device_train_batch_size": 2, "device": "cuda"},
    }  # fmt: skip
    return load_config(values, overrides)


def by_kind(made: Plan) -> dict[str, int]:
    return {kind: made.stages[0].memory.bytes_of(kind=kind) for kind in HOST_KINDS[1:]}


@pytest.mark.parametrize(
    ("overrides", "weights", "gradients", "states"),
    [
        ((), 2, 2, 12),
        (("train.precision=fp32",), 4, 4, 8),
        (("train.gradient_accumulation_steps=8",), 2, 4, 12),
        (("memory.master_weights=false",), 2, 2, 8),
        (("memory.master_weights=8bit",), 2, 2, 9),
    ],
)
def test_bytes_of_a_trained_parameter_by_hand(
    overrides: tuple[str, ...], weights: int, gradients: int, states: int
) -> None:
    made = plan(configure(OFFLOAD, *overrides))
    landing = 2 * V * D if "train.gradient_accumulation_steps=8" in overrides else 0
    assert by_kind(made) == {
        HOST_WEIGHTS: weights * TRAINED,
        HOST_GRADIENTS: gradients * TRAINED + landing,
        HOST_OPTIMIZER: states * TRAINED,
    }
    assert made.stages[0].memory.total_bytes == weights * TRAINED, "the device holds the weights alone"


def test_with_weights_on_the_host_the_device_holds_two_layers_whatever_the_depth() -> None:
    on_device = 2 * (2 * V * D + D) + 2 * (2 * MATRICES)  # embeddings, final norm, head, and two layers' matrices
    for depth in (LAYERS, 10):
        (stage,) = plan(configure(*WITH_WEIGHTS, f"model.num_hidden_layers={depth}")).stages
        assert stage.memory.total_bytes == on_device + depth * 2 * 2 * D, "and every layer's norms"
        assert stage.memory.bytes_of(kind=HOST_WEIGHTS) == 2 * (depth * LAYER + 2 * V * D + D)
    (one,) = plan(configure(*WITH_WEIGHTS, "model.num_hidden_layers=1")).stages
    assert one.memory.bytes_of("fetched_layers") == 2 * MATRICES


@pytest.mark.parametrize(
    ("model", "most"),
    [
        ((), 12 * 2**30),
        (
            (
                "model.hidden_size=5120",
                "model.intermediate_size=13824",
                "model.num_hidden_layers=40",
                "model.num_attention_heads=40",
            ),
            16 * 2**30,
        ),
    ],
    ids=["7B", "13B"],
)
def test_large_models_train_in_full_on_small_devices(model: tuple[str, ...], most: int) -> None:
    overrides = ("method=vanilla", "plan.num_stages=1", "train.gradient_checkpointing=true", *WITH_WEIGHTS, *model)
    made = plan(load_config("llama_7b", overrides))
    assert made.stages[0].device_bytes < most / 2


@pytest.mark.parametrize(
    "overrides", [(), ("memory.optimizer_states=8bit",), ("optim.name=muon",), ("optim.name=galore", "optim.rank=8")]
)
def test_what_the_host_holds_of_the_optimizer_is_what_the_device_held(overrides: tuple[str, ...]) -> None:
    staged = ("plan.num_stages=2", *overrides)
    for with_it, without in zip(
        plan(configure(OFFLOAD, "plan.layers=[2,1]", *staged)).stages,
        plan(configure("plan.layers=[2,1]", *staged)).stages,
        strict=True,
    ):
        assert with_it.memory.bytes_of(kind=HOST_OPTIMIZER) == without.memory.bytes_of(kind="optimizer")
        assert with_it.memory.bytes_of(kind="weights") == without.memory.bytes_of(kind="weights")
        assert with_it.memory.bytes_of(kind="optimizer") == with_it.memory.bytes_of(kind="gradients") == 0


def test_the_update_works_in_host_memory_and_newton_schulz_on_the_device() -> None:
    def at_update(*overrides: str) -> tuple[int, int]:
        (stage,) = plan(configure(OFFLOAD, *overrides)).stages
        assert stage.peak is not None
        memory = next(i.memory for i in stage.peak.instants if i.name == "optimizer step")
        return memory.total_bytes, memory.host_bytes

    device, host = at_update()
    assert device == 2 * TRAINED
    vectors = (2 * LAYERS + 1) * D
    assert host == 16 * TRAINED + 4 * (TRAINED - vectors), "and the gradients of all matrices in fp32"
    maps = LAYERS * [*4 * [(D, D)], *2 * [(F, D)], (D, F)]
    assert at_update("optim.name=muon")[0] == device + muon_product_bytes(maps, compute_width=2)


def test_newton_schulz_of_updates_made_during_the_backward_pass_is_part_of_its_peak() -> None:
    def in_backward(*overrides: str) -> int:
        (stage,) = plan(configure(OFFLOAD, "optim.name=muon", *overrides)).stages
        assert stage.peak is not None
        return sum(i.memory.total_bytes for i in stage.peak.instants if i.name == "backward of the embeddings")

    maps = LAYERS * [*4 * [(D, D)], *2 * [(F, D)], (D, F)]
    assert in_backward("memory.fused_backward=true") == in_backward() + muon_product_bytes(maps, compute_width=2)


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_transfers_by_hand(micro_batches: int) -> None:
    accumulated = f"train.gradient_accumulation_steps={micro_batches}"
    (stage,) = plan(configure(OFFLOAD, accumulated)).stages
    assert (stage.transfers.to_host, stage.transfers.to_device) == (micro_batches * 2 * TRAINED, 2 * TRAINED)
    (stage,) = plan(configure(OFFLOAD, accumulated, "optim.name=muon")).stages
    products = LAYERS * 2 * MATRICES
    assert stage.transfers.to_host == micro_batches * 2 * TRAINED + products
    assert stage.transfers.to_device == 2 * TRAINED + products
    # All three layers come up and the lowest comes down: in a first pass two are left from the way up, in a later one
    # two from the way down as well.
    (stage,) = plan(configure(*WITH_WEIGHTS, accumulated)).stages
    fetches = 2 + 2 * micro_batches
    assert stage.transfers.to_host == micro_batches * 2 * TRAINED
    assert stage.transfers.to_device == 2 * (TRAINED - LAYERS * MATRICES) + fetches * 2 * MATRICES
    (stage,) = plan(configure(accumulated)).stages
    assert (stage.transfers.to_host, stage.transfers.to_device) == (0, 0)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("distributed.world_size=2",), "FSDP2 shards them over 2 devices"),
    ],
)
def test_what_it_does_not_go_with_is_refused_with_the_reason(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=f"memory.offload_optimizer .*{told}: leave memory.offload_optimizer out"):
        plan(configure(OFFLOAD, *overrides))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "Set memory.optimizer_states=8bit or memory.master_weights=false, or leave memory.offload_optimizer out."),
        (("memory.optimizer_states=8bit",), "Set memory.master_weights=false, or leave memory.offload_optimizer out."),
        (("optim.name=apollo",), "Set memory.master_weights=false, or leave memory.offload_optimizer out."),
        (
            ("memory.optimizer_states=8bit", "memory.master_weights=false", "memory.offload_weights=true"),
            "Leave memory.offload_weights out.",
        ),
    ],
)
def test_above_a_host_budget_only_what_is_not_set_yet_is_suggested(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(PlanInfeasible, match=rf"on the device\. {told}$"):
        plan(configure(OFFLOAD, "plan.host_budget=1KiB", *overrides))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "updated in host memory: set memory.offload_optimizer=true, or"),
        ((OFFLOAD, "train.compile=true"), "a compiled layer cannot: set train.compile=false, or"),
        ((OFFLOAD, "method=badam"), "badam changes which layers are trained:"),
    ],
)
def test_weights_in_host_memory_are_refused_without_what_they_need(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=f"memory.offload_weights .*{told} leave memory.offload_weights out"):
        plan(configure("memory.offload_weights=true", *overrides))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "is for updates on the CPU: set memory.offload_optimizer=true, or"),
        ((OFFLOAD, "memory.fused_backward=true"), "need the old ones: set memory.fused_backward=false, or"),
        (WITH_WEIGHTS, "need the old ones: set memory.offload_weights=false, or"),
    ],
)
def test_a_delayed_update_is_refused_where_nothing_can_be_delayed(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=f"memory.delay_update .*{told} leave memory.delay_update out"):
        plan(configure("memory.delay_update=true", *overrides))


def test_what_a_delayed_update_needs_is_counted_in_every_pass() -> None:
    muon = (OFFLOAD, "optim.name=muon")
    plain, delayed = (plan(configure(*muon, f"memory.delay_update={value}")).stages[-1] for value in ("false", "true"))
    assert plain.peak is not None
    assert delayed.peak is not None
    by_name = {instant.name: instant.memory for instant in plain.peak.instants}
    update = by_name["optimizer step"]
    workspace = update.bytes_of("optimizer", "workspace"), update.bytes_of("optimizer", HOST)
    assert min(workspace) > 0
    for instant in delayed.peak.instants:
        if instant.name != "growth":
            memory, before = instant.memory, by_name[instant.name]
            at_same_time = memory.bytes_of("optimizer", "workspace"), memory.bytes_of("optimizer", HOST)
            assert at_same_time == workspace
            is_update = instant.name == "optimizer step"
            assert memory.total_bytes - before.total_bytes == (0 if is_update else workspace[0])


SMALL = ("memory.reserve=1KiB", "train.per_device_train_batch_size=1", "train.loss_chunk_size=16")


def test_fit_proposes_it_where_nothing_else_fits() -> None:
    without = fit(configure(*SMALL, "plan.host_budget=1KiB"), 2**30).smallest
    assert "optimizer in host memory" not in without.options, "nor the weights"
    rows = fit(configure(*SMALL), without.peak_bytes - 1 + 1024).alternatives
    assert all("memory.offload_optimizer=true" in row.overrides and row.host_bytes > 0 for row in rows)
    smallest = fit(configure(*SMALL), 2**30).smallest
    assert "trained layers in host memory" in smallest.options
    assert {"memory.offload_optimizer=true", "memory.offload_weights=true"} <= set(smallest.overrides)


def test_below_a_host_budget_options_that_take_none_of_it_are_tried_alone() -> None:
    config = configure(*SMALL, "plan.host_budget=1KiB")
    options = set(fit(config, 2**30).smallest.options)
    assert {"no master weights", "fused backward"} <= options
    assert not {"activations in host memory", "optimizer in host memory"} & options


def test_fit_leaves_out_what_needs_more_than_the_host_has() -> None:
    alone = fit(configure(*SMALL), 2**30)
    rows = fit(configure(*SMALL, OFFLOAD), 2**30).alternatives
    assert alone.best.host_bytes == 0
    needed = sorted(row.host_bytes for row in rows)
    assert len(set(needed)) > 1, "what this test needs"
    within = fit(configure(*SMALL, OFFLOAD, f"plan.host_budget={needed[0]}"), 2**30).alternatives
    assert max(row.host_bytes for row in within) <= needed[0]
    with pytest.raises(PlanInfeasible, match=r"every way to train needs more than plan\.host_budget=1.00 KiB"):
        fit(configure(*SMALL, OFFLOAD, "plan.host_budget=1KiB"), 2**30)
