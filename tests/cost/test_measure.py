"""Measured bytes equal planned bytes, and each way of going wrong shows in its own row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steplm.config import load_config
from steplm.cost.measure import check_against_plan, comparable, measure_model_state, measure_peak, reset_peak
from steplm.errors import MemoryMismatch
from steplm.planner.plan import Plan, Stage, plan
from steplm.schedule import trained_patterns
from steplm.types import MemoryEstimate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class FakeOptimizer:
    """The states that the accounting promises, without the arithmetic."""

    def __init__(self, model: nn.Module) -> None:
        self.states: dict[str, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                keys = ["exp_avg", "exp_avg_sq"] + ["master"] * (parameter.dtype != torch.float32)
                self.states[name] = {key: torch.zeros(parameter.shape) for key in keys}

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self.states


def make_plan(*overrides: str, model_type: str = "llama") -> Plan:
    values: dict[str, Any] = {
        "model": {
            "model_type": model_type, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 30,
            "extra": {"pad_token_id": 0},
        },
        "plan": {"num_stages": 3, "total_tokens": 10_000},
        "pet": {"rank": 4},
        "train": {"sequence_length": 16, "per_device_train_batch_size": 2},
    }  # fmt: skip
    return plan(load_config(values, overrides))


def stage_model(made: Plan, stage: Stage, model_type: str = "llama") -> PreTrainedModel:
    """The stage's model with bare adapter tensors, its trained parameters set, and gradients."""
    from fnmatch import fnmatchcase

    config = AutoConfig.for_model(
        model_type, hidden_size=16, intermediate_size=24, num_hidden_layers=stage.num_hidden_layers,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=30, pad_token_id=0,
        tie_word_embeddings=made.shape.tie_word_embeddings,
    )  # fmt: skip
    dtype, (phase,) = DTYPES[made.precision], stage.phases
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for index, adapter in phase.adapters.items():
        for name, module in model.model.layers[index].named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in adapter.target_modules:
                module.lora_A = nn.Parameter(torch.zeros(adapter.rank, module.in_features, dtype=dtype))
                module.lora_B = nn.Parameter(torch.zeros(module.out_features, adapter.rank, dtype=dtype))
    patterns = trained_patterns(phase, made.shape)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model


def measured_of(
    model: nn.Module, stage: Stage, optimizer: FakeOptimizer | None = None, *, expect_gradients: bool = False
) -> MemoryEstimate:
    states = FakeOptimizer(model) if optimizer is None else optimizer
    return measure_model_state(model, states, stage.num_hidden_layers, expect_gradients=expect_gradients)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_word_embeddings=true"],
        ["pet.method=none"],
        ["pet.target_modules=[q_proj,down_proj]"],
        ["plan.train_embeddings=first_stage"],
        ["method=growth"],
        ["method=growth", "plan.train_embeddings=first_stage"],
        ["plan.count_embeddings=false"],
        ["growth.position=lower"],
        ["growth.operator=stack"],
    ],
)
def test_measured_bytes_are_the_planned_bytes(precision: str, num_stages: int, overrides: list[str]) -> None:
    made = make_plan(f"train.precision={precision}", f"plan.num_stages={num_stages}", *overrides)
    for stage in made.stages:
        model = stage_model(made, stage)
        measured = measured_of(model, stage)
        check_against_plan(measured, stage.memory)
        assert comparable(measured, stage.memory).by_kind() == stage.memory.by_kind()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2", "olmo2", "phi3"])
def test_measured_bytes_are_the_planned_bytes_in_other_families(model_type: str) -> None:
    made = make_plan(model_type=model_type)
    for stage in made.stages:
        model = stage_model(made, stage, model_type)
        check_against_plan(measured_of(model, stage), stage.memory)


def rows_that_differ(model: nn.Module, optimizer: FakeOptimizer, stage: Stage) -> list[tuple[str, str]]:
    with pytest.raises(MemoryMismatch) as caught:
        check_against_plan(measured_of(model, stage, optimizer), stage.memory)
    return [(component, kind) for component, kind, _, _ in caught.value.rows]


def second_stage() -> tuple[Stage, PreTrainedModel]:
    made = make_plan()
    return made.stages[1], stage_model(made, made.stages[1])


def test_a_gradient_on_a_frozen_layer_is_seen() -> None:
    stage, model = second_stage()
    optimizer = FakeOptimizer(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.zeros_like(weight)
    assert rows_that_differ(model, optimizer, stage) == [("frozen_layers", "gradients")]


def test_states_that_were_never_freed_are_seen() -> None:
    stage, model = second_stage()
    optimizer = FakeOptimizer(model)
    optimizer.states["model.layers.0.mlp.up_proj.weight"] = {"exp_avg": torch.zeros(24, 16)}
    assert rows_that_differ(model, optimizer, stage) == [("frozen_layers", "optimizer")]


def test_adapters_in_another_precision_are_seen() -> None:
    stage, model = second_stage()
    optimizer = FakeOptimizer(model)
    projection = model.model.layers[0].self_attn.q_proj
    projection.lora_A.data = projection.lora_A.data.float()
    assert rows_that_differ(model, optimizer, stage) == [("adapters", "weights")]


def test_what_the_plan_does_not_count_is_measured_but_not_compared() -> None:
    made = make_plan("plan.count_embeddings=false")
    stage = made.stages[1]
    model = stage_model(made, stage)
    measured = measured_of(model, stage)
    left_out = measured.total_bytes - comparable(measured, stage.memory).total_bytes
    assert left_out == 16 * made.shape.outer_parameters
    counting = make_plan().stages[1].memory
    assert comparable(measured, counting) == measured


def test_the_message_shows_both_numbers_and_their_difference() -> None:
    stage, model = second_stage()
    optimizer = FakeOptimizer(model)
    del optimizer.states["model.norm.weight"]
    with pytest.raises(MemoryMismatch, match=r"final_norm optimizer +192 +0 +-192"):
        check_against_plan(measured_of(model, stage, optimizer), stage.memory)


def test_gradients_that_are_still_to_come_can_be_counted() -> None:
    stage, model = second_stage()
    optimizer = FakeOptimizer(model)
    for parameter in model.parameters():
        parameter.grad = None
    assert measured_of(model, stage, optimizer).bytes_of(kind="gradients") == 0
    check_against_plan(measured_of(model, stage, optimizer, expect_gradients=True), stage.memory)


def test_a_storage_is_counted_once_and_whole() -> None:
    stage, model = second_stage()
    layer = model.model.layers[0].self_attn
    both = torch.zeros(2, 8, 16, dtype=torch.bfloat16)
    layer.k_proj.weight = nn.Parameter(both[0], requires_grad=False)
    layer.v_proj.weight = nn.Parameter(both[1], requires_grad=False)
    check_against_plan(measured_of(model, stage), stage.memory)
    # A view of a storage that is larger than the tensor keeps all of it alive.
    layer.k_proj.weight = nn.Parameter(torch.zeros(3, 8, 16, dtype=torch.bfloat16)[0], requires_grad=False)
    assert rows_that_differ(model, FakeOptimizer(model), stage) == [("frozen_layers", "weights")]


def test_layers_are_measured_as_numbered_not_as_spelt() -> None:
    """Twelve layers: the pattern of layer 1 must not take in layers 10 and 11."""
    made = make_plan("model.num_hidden_layers=12", "plan.num_stages=2", "plan.layers=[11,1]", "growth.position=lower")
    stage = made.stages[1]
    model = stage_model(made, stage)
    measured = measured_of(model, stage)
    assert measured.bytes_of("trained_layers", "weights") == 2 * made.shape.layer_parameters
    check_against_plan(measured, stage.memory)


def test_peak_of_a_cpu_process_is_its_resident_memory() -> None:
    before = measure_peak("cpu")
    assert (before.peak_allocated_bytes, before.peak_reserved_bytes) == (None, None)
    assert before.peak_resident_bytes is not None
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    reset_peak("cpu")
    with_block = measure_peak("cpu").peak_resident_bytes
    assert with_block is not None
    assert with_block >= block.numel()
    assert str(measure_peak("cpu")).endswith("GiB resident") or str(measure_peak("cpu")).endswith("MiB resident")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_of_a_gpu_counts_tensors_and_the_allocator_apart() -> None:
    reset_peak("cuda")
    block = torch.ones(64 * 2**20, dtype=torch.uint8, device="cuda")
    peak = measure_peak("cuda")
    assert peak.peak_allocated_bytes is not None
    assert peak.peak_reserved_bytes is not None
    assert block.numel() <= peak.peak_allocated_bytes <= peak.peak_reserved_bytes
    assert peak.peak_resident_bytes is None
