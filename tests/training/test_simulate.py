"""Fake steps hold, to the byte, what real steps hold."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from steplm.config import RunConfig, load_config
from steplm.models import activations
from steplm.planner.plan import plan
from steplm.training import simulate
from steplm.training.simulate import (
    ASSEMBLY,
    AT_REST,
    BACKWARD,
    FORWARD,
    GROWTH,
    STEP,
    measure_phase,
    measure_timeline,
    simulate_growth,
    simulate_phase,
    simulate_timeline,
)
from steplm.training.timeline import GROWN_WEIGHTS, STAGE_WEIGHTS
from steplm.types import HOST, PeakEstimate

EVERYTHING = (
    "train.gradient_accumulation_steps=1",
    "train.sequence_length=256",
    "memory.optimizer_states=8bit",
    "memory.master_weights=false",
    "memory.fused_backward=true",
    "optim.max_grad_norm=null",
    "memory.frozen_weights=int8",
    "memory.offload_frozen=true",
    "memory.offload_activations=true",
)


def configure(*overrides: str) -> RunConfig:
    values = {
        "model": {
            "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 512,
        },
        "plan": {"num_stages": 2, "layers": [2, 1], "total_tokens": 100_000},
        "pet": {"rank": 8},
        "train": {
            "device": "cpu", "sequence_length": 64, "per_device_train_batch_size": 2, "loss_chunk_size": 64,
            "gradient_accumulation_steps": 4,
        },
    }  # fmt: skip
    return load_config(values, overrides)


def by_instant(peak: PeakEstimate) -> dict[str, dict[str, int]]:
    return {
        instant.name: {term.kind: term.num_bytes for term in instant.memory.terms if term.num_bytes}
        for instant in peak.instants
    }


@cache
def simulated(phase_index: int, *overrides: str) -> dict[str, dict[str, int]]:
    config = configure(*overrides)
    return by_instant(simulate_phase(config, plan(config).schedule.phases[phase_index - 1]))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.precision=fp32",),
        ("train.gradient_checkpointing=true",),
        ("train.gradient_checkpointing=true", "train.precision=fp32"),
        ("train.sequence_length=200", "train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=1"),
        ("data.within_documents=true",),
        ("model.model_type=qwen3", "model.tie_word_embeddings=true"),
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
def test_simulated_bytes_are_the_counted_bytes_of_real_tensors(overrides: tuple[str, ...]) -> None:
    config = configure(*overrides)
    for phase in plan(config).schedule.phases:
        assert list(simulated(phase.index, *overrides)) == [AT_REST, FORWARD, BACKWARD, STEP]
        assert simulated(phase.index, *overrides) == by_instant(measure_phase(config, phase, "cpu"))


def test_so_they_are_with_every_memory_option() -> None:
    config = configure(*EVERYTHING)
    instants = simulated(2, *EVERYTHING)
    assert list(instants) == [AT_REST, FORWARD, BACKWARD]
    assert instants == by_instant(measure_phase(config, plan(config).schedule.phases[1], "cpu"))
    assert instants[FORWARD][HOST] > instants[AT_REST][HOST] > 0, "frozen weights are there, and activations come"


@pytest.mark.parametrize("overrides", [(), EVERYTHING], ids=["plain", "every option"])
@pytest.mark.parametrize("stage_index", [1, 2])
def test_between_steps_there_is_the_planned_model_state(stage_index: int, overrides: tuple[str, ...]) -> None:
    planned = plan(configure(*overrides)).stages[stage_index - 1].memory
    at_rest = simulated(stage_index, *overrides)[AT_REST]
    for kind in ("weights", "optimizer", HOST):
        assert at_rest.get(kind, 0) == planned.bytes_of(kind=kind)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("stage_index", [1, 2])
def test_an_optimizer_in_host_memory_leaves_the_weights_alone_on_the_device(
    stage_index: int, micro_batches: int
) -> None:
    overrides = ("memory.offload_optimizer=true", f"train.gradient_accumulation_steps={micro_batches}")
    planned = plan(configure(*overrides)).stages[stage_index - 1].memory
    instants = simulated(stage_index, *overrides)
    assert instants[AT_REST][HOST] == planned.host_bytes > 0
    assert instants[AT_REST]["weights"] == planned.total_bytes
    assert "optimizer" not in instants[AT_REST]
    assert not any("gradients" in instants[part] for part in (AT_REST, FORWARD, STEP))
    assert instants[STEP] == instants[AT_REST], "the update works in host memory"


@pytest.mark.parametrize("stage_index", [1, 2])
def test_all_gradients_live_at_the_optimizer_step(stage_index: int) -> None:
    planned = plan(configure()).stages[stage_index - 1].memory
    assert simulated(stage_index)[STEP]["gradients"] == planned.bytes_of(kind="gradients")


def test_a_second_micro_batch_meets_the_gradients_of_the_first() -> None:
    once, often = simulated(2, "train.gradient_accumulation_steps=1"), simulated(2)
    gradients = plan(configure()).stages[1].memory.bytes_of(kind="gradients")
    assert often[FORWARD] == {**once[FORWARD], "gradients": gradients}
    assert often[BACKWARD]["gradients"] == gradients


class Seen(TorchDispatchMode):
    """Names of the operations, and the largest number of elements that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.names.add(func.__name__.partition(".")[0])
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(("num_key_value_heads", "sequence_length"), [(4, 64), (2, 509), (1, 509)])
def test_fake_attention_is_the_flash_kernel(
    num_key_value_heads: int, sequence_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen()
    forward = simulate._forward

    def watched(*args, **kwargs):  # type: ignore[no-untyped-def]
        with seen:
            return forward(*args, **kwargs)

    monkeypatch.setattr(simulate, "_forward", watched)
    config = configure(f"model.num_key_value_heads={num_key_value_heads}", f"train.sequence_length={sequence_length}")
    simulate_phase(config, plan(config).schedule.phases[1])
    assert "_scaled_dot_product_flash_attention_for_cpu" in seen.names
    assert "_softmax" not in seen.names
    linear = 2 * sequence_length * 176  # the widest activation; attention scores would be 8 S^2
    assert seen.largest <= max(linear, 500 * 64)


def test_growth_holds_plain_weights_and_little_else() -> None:
    config = configure()
    made = plan(config)
    (growth,) = simulate_growth(config, made.schedule.phases[1]).instants
    assert growth.name == GROWTH
    assert growth.memory.bytes_of(kind="weights") == 2 * made.shape.num_parameters()
    assert growth.memory.total_bytes < sum(simulated(2)[FORWARD].values())
    assert growth.memory.bytes_of(kind="rest") < simulated(2)[FORWARD]["rest"]


def test_the_timeline_has_every_part_and_its_peak() -> None:
    config = configure()
    parts = simulate_timeline(config, plan(config).schedule.phases[1])
    steps = [FORWARD, BACKWARD, STEP, *2 * [FORWARD, BACKWARD], STEP]
    assert [part.name for part in parts] == [GROWN_WEIGHTS, GROWTH, STAGE_WEIGHTS, ASSEMBLY, AT_REST, *steps]
    peaks = {name: max(part.peak_bytes for part in parts if part.name == name) for name in simulated(2)}
    assert peaks == {name: sum(by_kind.values()) for name, by_kind in simulated(2).items()}


def test_a_measured_timeline_is_the_simulated_one() -> None:
    config = configure()
    phase = plan(config).schedule.phases[1]
    fake, real = simulate_timeline(config, phase), measure_timeline(config, phase)
    assert [(part.name, part.peak_bytes) for part in fake] == [(part.name, part.peak_bytes) for part in real]


def test_what_is_replaced_for_the_simulation_is_put_back() -> None:
    before = masking_utils.find_packed_sequence_indices, activations.to_host
    simulated.__wrapped__(1)
    assert before == (masking_utils.find_packed_sequence_indices, activations.to_host)
