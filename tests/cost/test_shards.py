"""Model-state bytes of every rank: tensors of real models cut by ``torch.chunk``, as FSDP2 cuts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from steplm.config import load_config
from steplm.cost.terms import model_state
from steplm.models.shape import shape_from_model
from steplm.pet.adapters import attach
from steplm.pet.trainable import apply_trainable
from steplm.planner.plan import Plan, plan
from steplm.planner.solve import SOLVERS, peak_cost, solve_exhaustive
from steplm.planner.stages import StagePrices
from steplm.schedule import Phase, Trained, trained_patterns
from steplm.types import MemoryEstimate, local_size

SMALL = {
    "hidden_size": 20, "intermediate_size": 27, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 31,
    "max_position_embeddings": 64,
}  # fmt: skip


def make_plan(*overrides: str, model_type: str = "llama") -> Plan:
    values: dict[str, Any] = {
        "model": {**SMALL, "model_type": model_type, "num_hidden_layers": 5, "extra": {"head_dim": 10}},
        "plan": {"num_stages": 2, "layers": [3, 2], "total_tokens": 10**6},
        "pet": {"rank": 3},
        "train": {"sequence_length": 16},
    }
    return plan(load_config(values, overrides))


def phase_model(made: Plan, phase: Phase) -> nn.Module:
    config = AutoConfig.for_model(
        made.shape.model_type, **SMALL, head_dim=10, num_hidden_layers=phase.num_hidden_layers,
        tie_word_embeddings=made.shape.tie_word_embeddings, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    attach(model, phase, made.shape.layer_prefix, seed=0)
    apply_trainable(model, trained_patterns(phase, made.shape))
    return model


def cut_bytes(model: nn.Module, num_shards: int, rank: int) -> dict[str, int]:
    """Of bf16 weights, with gradients and states of those that are trained: each tensor chunked along dimension 0."""
    held = dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    for parameter in model.parameters():
        chunks = torch.chunk(parameter.detach(), num_shards)
        size = chunks[rank].numel() if rank < len(chunks) else 0
        held["weights"] += 2 * size
        held["gradients"] += 2 * size * parameter.requires_grad
        held["optimizer"] += 12 * size * parameter.requires_grad
    return held


def by_kind(memory: MemoryEstimate) -> dict[str, int]:
    return {kind: memory.bytes_of(kind=kind) for kind in ("weights", "gradients", "optimizer")}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["plan.num_stages=1", "plan.layers=null"],
        ["model.tie_word_embeddings=true"],
        ["pet.method=none"],
        ["pet.target_modules=[q_proj,down_proj]"],
        ["plan.train_embeddings=first_stage"],
        ["plan.train_embeddings=adapters"],
        ["plan.train_embeddings=adapters", "model.tie_word_embeddings=true"],
        ["method=growth"],
        ["method=lora", "plan.num_stages=1", "plan.layers=null"],
    ],
)
def test_the_plan_is_the_first_rank_and_no_other_holds_more(num_shards: int, overrides: list[str]) -> None:
    made = make_plan(f"distributed.world_size={num_shards}", *overrides)
    for phase in made.schedule.phases:
        model = phase_model(made, phase)
        ranks = [cut_bytes(model, num_shards, rank) for rank in range(num_shards)]
        assert by_kind(made.cost(phase).memory) == ranks[0]
        assert all(rank[kind] <= ranks[0][kind] for rank in ranks for kind in rank)
        whole = sum(parameter.numel() for parameter in model.parameters())
        assert sum(rank["weights"] for rank in ranks) == 2 * whole


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2", "olmo2", "phi3", "olmo"])
def test_so_it_is_in_families_with_biases_and_other_norms(model_type: str) -> None:
    made = make_plan("distributed.world_size=6", model_type=model_type)
    for phase in made.schedule.phases:
        assert by_kind(made.cost(phase).memory) == cut_bytes(phase_model(made, phase), 6, 0)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "stablelm", "phi"])
def test_so_it_is_in_families_that_are_counted_by_building_them(
    make_phase: Callable[..., Phase], model_type: str
) -> None:
    extra = {"ffn_dim": 27, "word_embed_proj_dim": 12} if model_type == "opt" else {}
    sizes = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    config = AutoConfig.for_model(model_type, **sizes, **extra, num_hidden_layers=2, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_from_model(model)
    of_run = load_config(
        {"model": {**SMALL, "num_hidden_layers": 2}, "plan": {"num_stages": 1, "total_tokens": 10**6}},
        ["distributed.world_size=3", "train.sequence_length=16"],
    )
    assert by_kind(model_state(of_run, shape, make_phase([Trained()] * 2))) == cut_bytes(model, 3, 0)


@given(rows=st.integers(1, 50), columns=st.integers(1, 5), num_shards=st.integers(1, 60))
@settings(deadline=None)
def test_the_rows_of_the_first_rank_are_its_chunk(rows: int, columns: int, num_shards: int) -> None:
    assert local_size((rows, columns), num_shards) == torch.chunk(torch.empty(rows, columns), num_shards)[0].numel()
    assert local_size((rows,), num_shards) == torch.chunk(torch.empty(rows), num_shards)[0].numel()


def test_copies_of_the_model_divide_nothing_further() -> None:
    def memory(*overrides: str) -> list[MemoryEstimate]:
        return [stage.memory for stage in make_plan(*overrides).stages]

    assert memory("distributed.world_size=4") == memory("distributed.world_size=12", "distributed.shard_size=4")
    assert memory() == memory("distributed.world_size=12", "distributed.shard_size=1")


@pytest.mark.parametrize("objective", ["peak", "model_state"])
@pytest.mark.parametrize("world", [["4"], ["7"], ["8", "2"], ["4", "1"]])
def test_the_division_into_stages_is_still_the_best(world: list[str], objective: str) -> None:
    keys = [f"distributed.{key}={n}" for key, n in zip(("world_size", "shard_size"), world, strict=False)]
    overrides = [*keys, f"plan.objective={objective}", "plan.num_stages=3", "plan.layers=null"]
    config = load_config(
        {
            "model": {**SMALL, "hidden_size": 64, "num_hidden_layers": 9},
            "plan": {"total_tokens": 10**6},
            "pet": {"rank": 4},
            "train": {"sequence_length": 16, "per_device_train_batch_size": 1},
        },
        overrides,
    )
    made = plan(config)
    costs = StagePrices(config, made.shape)
    reference = solve_exhaustive(costs.objective_bytes, 9, 3)
    for solve in SOLVERS.values():
        assert solve(costs.objective_bytes, 9, 3) == reference
    best = made.peak_bytes if objective == "peak" else made.peak_model_state_bytes
    assert best == peak_cost(costs.objective_bytes, reference)
    assert made.layers == reference
