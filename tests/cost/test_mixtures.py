"""Phases that no method makes: every layer has a role of its own, and the costs are still those of real steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from steplm.config import RunConfig, load_config
from steplm.cost.flops import training_flops_per_token
from steplm.cost.formats import MIN_OFFLOADED_BYTES
from steplm.cost.peak import Instants
from steplm.cost.price import price
from steplm.cost.sharded import ShardedInstants
from steplm.cost.terms import model_state
from steplm.planner.shape import shape_from_hf_config
from steplm.schedule import Adapter, Frozen, Phase, Role, Trained
from steplm.training.simulate import AT_REST, simulate_phase

MakePhase = Callable[..., Phase]
LOW, HIGH = -0.001, 0.03
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def on(rank: int, *targets: str) -> Adapter:
    return Adapter(rank, 2.0 * rank, targets or ALL)


def configure(*overrides: str) -> RunConfig:
    values: dict[str, Any] = {
        "model": {
            "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "num_attention_heads": 4,
            "vocab_size": 500, "max_position_embeddings": 4096,
        },
        "optim": {"rank": 16},
        "train": {"device": "cpu", "sequence_length": 64, "per_device_train_batch_size": 4, "loss_chunk_size": 64},
    }  # fmt: skip
    return load_config(values, overrides)


SHAPE = shape_from_hf_config(configure().model.hf_config())
MIXTURES: dict[str, tuple[list[Role], Role]] = {
    "ranks that rise": ([on(2), on(4), on(8), on(16), on(32), Trained()], Trained()),
    "ranks that fall": ([on(64), on(32), on(8), on(4), on(2), on(1)], Trained()),
    "other targets in each layer": (
        [
            on(8, "q_proj", "v_proj"),
            on(4, "down_proj"),
            on(8),
            Trained(),
            on(16, "gate_proj", "up_proj"),
            on(2, "o_proj"),
        ],
        Trained(),
    ),
    "trained between frozen and adapted": ([Frozen(), on(8), Trained(), Frozen(), on(32), Trained()], Trained()),
    "the lowest are not reached": ([Frozen(), Frozen(), on(4), Frozen(), Trained(), on(16)], Frozen()),
    "nothing but an adapter": ([Frozen(), Frozen(), Frozen(), on(4), Frozen(), Frozen()], Frozen()),
    "embeddings under an adapter of another rank": ([on(2), on(16), Trained(), on(8), Frozen(), Trained()], on(6)),
}  # fmt: skip
# Rules that take turns over layers, adapters among them.
OF_RULES: dict[str, tuple[list[Role], Role]] = {
    "three rules": ([Trained("apollo_mini"), Trained(), Trained("galore"), Trained(), on(8), Frozen()], Trained()),
    "muon above scale": (
        [Trained("scale"), Trained("scale"), Trained("muon"), on(8), Trained("muon"), on(4)],
        Trained(),
    ),
    "muon on adapters of two ranks": (
        [Adapter(8, 16.0, ALL, rule="muon"), Adapter(32, 64.0, ALL, rule="muon"), on(16), Trained(), Trained(), on(4)],
        Trained(),
    ),
}  # fmt: skip
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "summed": ("train.gradient_accumulation_steps=2",),
    "recomputed": ("train.gradient_checkpointing=true",),
    "frozen recomputed": ("train.gradient_checkpointing=frozen",),
    "fused": ("memory.fused_backward=true", "optim.max_grad_norm=null"),
    "packed, on the host": (
        "memory.frozen_weights=nf4", "memory.offload_frozen=true", "memory.master_weights=false",
        "train.sequence_length=256",  # or one dequantized matrix counts for much
    ),
    "few tokens": ("train.sequence_length=8", "train.per_device_train_batch_size=1"),  # so that the update is the peak
    "activations on the host": ("memory.offload_activations=true", "train.precision=fp32"),
}  # fmt: skip


def assert_agree(config: RunConfig, phase: Phase) -> None:
    """The planned and the simulated peak of a step."""
    instants = Instants(config, SHAPE, phase).in_order(grows=False)
    planned = max(instant.memory.total_bytes for instant in instants if instant.name != "evaluation")
    simulated = simulate_phase(config, phase).total_bytes
    assert (planned + left_out(config, phase)) / simulated - 1 >= LOW
    assert planned / simulated - 1 <= HIGH


def left_out(config: RunConfig, phase: Phase) -> int:
    """Bytes of the adapters' products ``w N r`` that are too small to move to the host, which the plan leaves out."""
    if not config.memory.offload_activations:
        return 0
    tokens = config.micro_batch_size * config.train.sequence_length
    products = [
        {"bf16": 2, "fp32": 4}[config.train.precision] * tokens * adapter.rank
        for adapter in phase.adapters.values()
        for _ in adapter.target_modules
    ]
    return sum(size for size in products if size < MIN_OFFLOADED_BYTES)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MIXTURES)
def test_planned_and_simulated_peak_of_a_mixture_agree(make_phase: MakePhase, name: str, run: str) -> None:
    assert_agree(configure(*RUNS[run]), make_phase(*MIXTURES[name]))


@pytest.mark.parametrize("run", ["plain", "fused", "few tokens"])
@pytest.mark.parametrize("name", OF_RULES)
def test_so_they_do_under_several_rules(make_phase: MakePhase, name: str, run: str) -> None:
    assert_agree(configure(*RUNS[run]), make_phase(*OF_RULES[name]))


@pytest.mark.parametrize("name", [*MIXTURES, *OF_RULES])
def test_between_two_steps_each_kind_of_tensor_has_the_planned_bytes(make_phase: MakePhase, name: str) -> None:
    phase, config = make_phase(*{**MIXTURES, **OF_RULES}[name]), configure()
    at_rest = next(i.memory for i in simulate_phase(config, phase).instants if i.name == AT_REST)
    planned = model_state(config, SHAPE, phase)
    for kind in ("weights", "optimizer"):
        assert at_rest.bytes_of(kind=kind) == planned.bytes_of(kind=kind), kind


def test_layers_of_one_role_cost_the_same_wherever_they_are_but_for_what_waits(make_phase: MakePhase) -> None:
    config, roles = configure(), MIXTURES["trained between frozen and adapted"][0]
    one, other = (make_phase(layers) for layers in (roles, roles[::-1]))
    assert model_state(config, SHAPE, one).by_kind() == model_state(config, SHAPE, other).by_kind()
    assert training_flops_per_token(SHAPE, one, 64) == training_flops_per_token(SHAPE, other, 64)
    updates = [price(config, SHAPE, phase).peak.instants[-2].memory.total_bytes for phase in (one, other)]  # type: ignore[union-attr]
    assert updates[0] == updates[1]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_rank_that_has_the_whole_model_to_itself_plans_the_model_state_of_one_device(
    make_phase: MakePhase, name: str
) -> None:
    phase = make_phase(*MIXTURES[name])
    alone, copies = configure(), configure("distributed.world_size=4", "distributed.shard_size=1")
    assert model_state(alone, SHAPE, phase) == model_state(copies, SHAPE, phase)
    sharded = configure("distributed.world_size=4")
    for config in (copies, sharded):
        instants = ShardedInstants(config, SHAPE, phase).in_order(grows=False)
        assert all(term.num_bytes > 0 for instant in instants for term in instant.memory.terms)
    assert model_state(sharded, SHAPE, phase).total_bytes < model_state(alone, SHAPE, phase).total_bytes / 3.9
