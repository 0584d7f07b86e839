"""Planned bytes of a rank are those that FSDP2 itself holds, counted in one process: nobody is at the other end.

A fake process group sends nothing and leaves buffers as they are; all is allocated and freed as on a real one. Each
count is made in a forked child: the caches of ``DTensor`` keep the mesh, and so the rank, of the first who used it,
and the tests that fork real ranks of this process must find them empty.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from steplm.config import RunConfig, load_config
from steplm.cost.count import ByteCounter
from steplm.cost.formats import CODE_BOOK_BYTES
from steplm.distributed.world import World
from steplm.models.build import DTYPES, hf_config, initial_state
from steplm.models.forward import batch_loss
from steplm.optim.base import global_grad_norm
from steplm.planner.plan import plan
from steplm.rows import Rows, on_this_rank
from steplm.schedule import Phase
from steplm.training.assemble import Assembled, PhaseStart, assemble
from steplm.types import ModelShape, TrainState

LOW, HIGH = -0.001, 0.03
RECOMPUTED = "train.gradient_checkpointing=true"


def configure(*overrides: str) -> RunConfig:
    values: dict[str, Any] = {
        "model": {
            "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5, "num_attention_heads": 4,
            "vocab_size": 500, "max_position_embeddings": 4096,
            "extra": {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
        },
        "plan": {"num_stages": 2, "layers": [3, 2], "total_tokens": 10**8},
        "pet": {"rank": 8},
        "train": {"device": "cpu", "sequence_length": 64, "per_device_train_batch_size": 1, "loss_chunk_size": 64},
    }  # fmt: skip
    return load_config(values, overrides)


@contextmanager
def fake_world(num_shards: int, num_replicas: int, rank: int = 0) -> Iterator[World]:
    """One rank of many, alone in truth."""
    size = num_shards * num_replicas
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (num_replicas, num_shards), mesh_dim_names=("replicate", "shard"))
        yield World(torch.device("cpu"), rank, size, rows=Rows(rank % num_shards, num_shards), mesh=mesh)
    finally:
        dist.destroy_process_group()


def assembled(config: RunConfig, shape: ModelShape, phase: Phase, world: World) -> Assembled:
    shape_config = hf_config(config.model.hf_config(), phase.num_hidden_layers)
    weights = initial_state(shape_config, seed=0, dtype=DTYPES[config.train.precision])
    cut = {name: world.rows.cut(weight) for name, weight in weights.items()}
    start = PhaseStart(shape_config, cut, (), TrainState(phase.stage, phase.index, 0, 0, 0))
    return assemble(config, shape, phase, start, world, check=False)


class Counter(ByteCounter):
    """Sees storages that are resized outside of operations, too."""

    def __enter__(self) -> Any:
        self._resize = (_fsdp_param.alloc_storage, _fsdp_param.free_storage)
        alloc, free = map(self._counting, self._resize)
        _fsdp_param.alloc_storage = _fsdp_param_group.alloc_storage = alloc
        _fsdp_param.free_storage = free
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _fsdp_param.alloc_storage, _fsdp_param.free_storage = self._resize
        _fsdp_param_group.alloc_storage = self._resize[0]
        super().__exit__(*exception)

    def _counting(self, resize: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def counted(tensor: Tensor) -> None:
            resize(tensor)
            self.track(tensor, "gathered")

        return counted


@cache
def counted(stage_index: int, *overrides: str) -> dict[str, int]:
    """The most bytes in each part of a step, and after it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as child:
        return child.submit(count, stage_index, *overrides).result()


def count(stage_index: int, *overrides: str) -> dict[str, int]:
    torch.set_num_threads(1)  # of the parent's threads none is here
    config = configure(*overrides)
    planned, distributed = plan(config), config.distributed
    (phase,) = planned.schedule.stages[stage_index - 1]
    num_replicas = distributed.world_size // distributed.num_shards
    fused = config.memory.fused_backward
    highest: dict[str, int] = {}
    with fake_world(distributed.num_shards, num_replicas) as world, Counter() as counter:
        made = assembled(config, planned.shape, phase, world)
        for parameter in made.model.parameters():
            counter.track(on_this_rank(parameter.detach()), "weights")
        for states in made.rules.state_tensors().values():
            for state in states.values():
                counter.track(state, "optimizer")

        @contextmanager
        def part(name: str) -> Iterator[None]:
            counter.reset_peak()
            yield
            highest[name] = max(highest.get(name, 0), counter.peak_bytes)

        for _ in range(min(config.micro_batches, 2)):
            with part("forward"):
                tokens = torch.zeros(config.micro_batch_size, config.train.sequence_length, dtype=torch.long)
                labels = torch.zeros_like(tokens)
                loss = batch_loss(
                    made.model, tokens, labels, num_valid=labels.numel(), chunk_size=config.train.loss_chunk_size
                )
            with part("backward"), made.rules.in_backward(1e-3) if fused else nullcontext():
                loss.backward()
            del loss, tokens, labels
        with part("step"):
            if not fused:
                global_grad_norm(made.rules.parameters.values())
                made.rules.step(1e-3, 0.5)
            made.rules.zero_grad()
        with part("rest"):
            pass
    return highest


def difference(stage_index: int, *overrides: str) -> float:
    """Planned / counted peak - 1; a growth and an evaluation are no part of what is counted."""
    config = configure(*overrides)
    stage = plan(config).stages[stage_index - 1]
    assert stage.peak is not None
    of_steps = [instant for instant in stage.peak.instants if instant.name not in ("growth", "evaluation")]
    planned = max(instant.memory.total_bytes for instant in of_steps)
    return planned / max(counted(stage_index, *overrides).values()) - 1


WORLDS = {
    "all share one copy": ("distributed.world_size=4",),
    "a number that divides nothing": ("distributed.world_size=7",),
    "more devices than adapters have rows": ("distributed.world_size=16",),
    "two copies": ("distributed.world_size=8", "distributed.shard_size=4"),
    "two devices share a copy": ("distributed.world_size=4", "distributed.shard_size=2"),
    "a copy each": ("distributed.world_size=4", "distributed.shard_size=1"),
}


@pytest.mark.parametrize("world", WORLDS)
def test_between_two_steps_a_rank_holds_its_rows_of_weights_and_states(world: str) -> None:
    config = configure(*WORLDS[world])
    for stage in plan(config).stages:
        held = stage.memory.total_bytes - stage.memory.bytes_of(kind="gradients")
        rotary_frequencies = 2 * 4 * 16
        assert counted(stage.index, *WORLDS[world])["rest"] == held + rotary_frequencies


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", WORLDS)
def test_planned_and_counted_peak_of_a_rank_agree(world: str, stage: int) -> None:
    assert LOW <= difference(stage, *WORLDS[world]) <= HIGH


FUSED = ("memory.fused_backward=true", "optim.max_grad_norm=null")
GALORE = ("optim.name=galore", "optim.rank=16")
OLD_UNDER_GALORE = ("method=thawed", "optim.old_layers=galore", "optim.rank=16", "memory.master_weights=adamw")
FP32, SUMMED = "train.precision=fp32", "train.gradient_accumulation_steps=2"
RUNS: dict[str, tuple[str, ...]] = {
    "recomputed": (RECOMPUTED,),
    "several micro-batches": (SUMMED,),
    "fp32": (FP32,),
    "fp32, several micro-batches": (FP32, SUMMED),
    "a tied head": ("model.tie_word_embeddings=true", "model.vocab_size=4000"),
    "many embeddings": ("model.vocab_size=8000", RECOMPUTED),
    "adapted embeddings": ("plan.train_embeddings=adapters", "model.vocab_size=4000"),
    "adapted tied embeddings": ("plan.train_embeddings=adapters", "model.tie_word_embeddings=true"),
    "frozen embeddings": ("plan.train_embeddings=first_stage",),
    "no adapters": ("pet.method=none",),
    "few adapters": ("pet.target_modules=[down_proj]", RECOMPUTED),
    "no freezing": ("method=growth",),
    "qwen2, which has biases": ("model.model_type=qwen2",),
    "qwen3, which normalizes heads": ("model.model_type=qwen3", "model.extra={head_dim: 32, pad_token_id: 0}"),
    "new layers in between": ("growth.position=even", SUMMED),
    "new layers below": ("growth.position=lower",),
    "long sequences": ("train.sequence_length=1024",),
    "no master weights": ("memory.master_weights=false",),
    "fused": FUSED,
    "fused, recomputed": (*FUSED, RECOMPUTED),
    "a share of a global batch": ("train.global_batch_size=16", "train.per_device_train_batch_size=2"),
}


@pytest.mark.parametrize("name", RUNS)
def test_so_they_do_in_every_run(name: str) -> None:
    assert LOW <= difference(2, "distributed.world_size=4", *RUNS[name]) <= HIGH


@pytest.mark.parametrize("name", ["several micro-batches", "fp32, several micro-batches", "many embeddings"])
@pytest.mark.parametrize("world", ["two copies", "a copy each"])
def test_so_they_do_between_copies(world: str, name: str) -> None:
    assert LOW <= difference(2, *WORLDS[world], *RUNS[name]) <= HIGH


# Other rules than AdamW work on whole matrices: a copy each.
OF_RULES: dict[str, tuple[str, ...]] = {
    "galore": GALORE,
    "galore, fused": (*GALORE, *FUSED),
    "apollo_mini, fused": ("optim.name=apollo_mini", *FUSED),
    "muon": ("optim.name=muon",),
    "muon in 8 bits": ("optim.name=muon", "memory.optimizer_states=8bit", "memory.master_weights=8bit"),
    "muon on adapters": ("pet.rule=muon",),
    "old layers under scale": ("method=thawed", "optim.old_layers=scale"),
    "old layers under galore": OLD_UNDER_GALORE,
    "old layers under galore, fused": (*OLD_UNDER_GALORE, *FUSED),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_RULES)
def test_so_they_do_under_other_rules(name: str) -> None:
    assert LOW <= difference(2, *WORLDS["a copy each"], *OF_RULES[name]) <= HIGH


MASTERS = {"fp32": "true", "8bit": "8bit", "none": "false"}
SHARDED_RULES: dict[str, tuple[str, ...]] = {
    "muon": ("optim.name=muon",),
    "muon, 8-bit master weights": ("optim.name=muon", "memory.master_weights=8bit"),
    "muon on adapters": ("optim.name=muon", "pet.rule=muon"),
    "scale": ("optim.name=scale",),
    "scale, fused": ("optim.name=scale", *FUSED),
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", SHARDED_RULES)
@pytest.mark.parametrize("world", ["all share one copy", "a number that divides nothing", "two copies"])
def test_so_they_do_where_a_rule_works_on_shards(world: str, name: str, stage: int) -> None:
    assert LOW <= difference(stage, *WORLDS[world], *SHARDED_RULES[name]) <= HIGH


@pytest.mark.parametrize("masters", ["fp32", "8bit", "none"])
@pytest.mark.parametrize("world", ["all share one copy", "a number that divides nothing", "two copies"])
def test_the_update_of_muon_on_shards_holds_what_is_planned(world: str, masters: str) -> None:
    few_embeddings = ("model.vocab_size=64", "optim.name=muon", f"memory.master_weights={MASTERS[masters]}")
    config = configure(*WORLDS[world], *few_embeddings)
    (planned,) = (i for i in plan(config).stages[0].peak.instants if i.name == "optimizer step")
    held = counted(1, *WORLDS[world], *few_embeddings)["step"]
    assert 0 <= held - planned.memory.total_bytes <= 1024  # the norm's scalars, rotary frequencies


IN_8_BITS = ("memory.optimizer_states=8bit", "model.hidden_size=256", "model.intermediate_size=512")
SHARDED_IN_8_BITS: dict[str, tuple[str, ...]] = {
    "adamw": (*WORLDS["all share one copy"], *IN_8_BITS, "model.vocab_size=512"),
    "muon, two copies": (*WORLDS["two copies"], *IN_8_BITS, "optim.name=muon", "pet.rule=muon"),
    "muon, no master weights, rows that do not divide": (
        *WORLDS["a number that divides nothing"], *IN_8_BITS, "optim.name=muon", "method=growth",
        "memory.master_weights=false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDED_IN_8_BITS)
def test_so_they_do_with_8_bit_states_on_shards(name: str) -> None:
    overrides = SHARDED_IN_8_BITS[name]
    assert LOW <= difference(2, *overrides) <= HIGH
    memory = plan(configure(*overrides)).stages[1].memory
    held = counted(2, *overrides)["rest"] - memory.total_bytes + memory.bytes_of(kind="gradients")
    assert held == CODE_BOOK_BYTES + 2 * 4 * 32  # the rotary frequencies
