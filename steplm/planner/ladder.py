"""What ``steplm fit`` may change: memory options, cheapest first, and the sizes it can maximize."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from steplm.config import RunConfig
from steplm.planner.methods import written
from steplm.planner.shape import shape_from_hf_config

Changes = Mapping[str, Any]  # "section.key" -> value


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A memory option, applied on top of those before it in ``LADDER``; its price is that of all of them together.

    Prices are points set by judgment: by bytes and FLOPs alone, the strongest option would always be the best.
    """

    name: str
    price: int
    key: str
    value: Any = True
    replaces: tuple[Any, ...] = (False,)  # configured values that the option can replace
    time: str = ""
    quality: str = ""
    loss: str = ""  # measured loss difference, and at which scale (docs/memory.md, docs/results.md)
    on_frozen: bool = False  # has no effect unless layers are frozen
    on_host: bool = False  # uses host memory; with a host budget, the ladder without such rungs is tried too
    needs: tuple[tuple[str, Any], ...] = ()  # other settings that the option requires


# Options that only cost time and leave the results of training unchanged come first, the fastest first. 8-bit states
# are among them because they cost almost no time, while transfers can cost a lot when micro-batches are short. Options
# that change the results follow. Quantized frozen weights come late among these, because they are dequantized in every
# pass and merged with an error. The fused update is last: if the run accumulates gradients, it changes the tokens per
# step and therefore the learning rate.
LADDER: tuple[Rung, ...] = (
    Rung(
        name="recompute frozen layers",
        price=1,
        key="train.gradient_checkpointing",
        value="frozen",
        time="one more forward pass of the frozen layers",
        on_frozen=True,
    ),
    Rung(
        name="recompute all layers",
        price=2,
        key="train.gradient_checkpointing",
        replaces=(False, "frozen", "new"),
        time="one more forward pass of all layers",
    ),
    Rung(
        name="8-bit states",
        price=4,
        key="memory.optimizer_states",
        value="8bit",
        replaces=("fp32",),
        time="a longer update, once per step",
        quality="moments rounded to 8 bits in blocks; within noise in the source",
        loss="+0.001 (11M, 500k tokens, two seeds)",
    ),
    Rung(
        name="frozen in host memory",
        price=6,
        key="memory.offload_frozen",
        time="frozen weights cross the bus twice per micro-batch, overlapping with computation",
        on_frozen=True,
        on_host=True,
    ),
    Rung(
        name="activations in host memory",
        price=8,
        key="memory.offload_activations",
        time="activations cross the bus twice per micro-batch",
        on_host=True,
    ),
    Rung(
        name="no master weights",
        price=10,
        key="memory.master_weights",
        value=False,
        replaces=(True, "adamw"),
        quality="updates are rounded stochastically to bf16",
        loss="+0.002 (11M, 500k tokens, two seeds)",
    ),
    Rung(
        name="Muon",
        price=11,
        key="optim.name",
        value="muon",
        replaces=("adamw",),
        time="3% of a step of 131k tokens, 43% of one of 8k, on a CPU",
        quality="a different update rule",
        loss="−0.14 with 8-bit states, no master weights (0.66M, 15 tokens per parameter, three seeds)",
    ),
    Rung(
        name="int8 frozen",
        price=12,
        key="memory.frozen_weights",
        value="int8",
        replaces=("full",),
        time="frozen layers are dequantized in every pass",
        quality="frozen layers rounded to 8 bits at each growth",
        loss="+0.003 (11M, 500k tokens, two seeds)",
        on_frozen=True,
    ),
    Rung(
        name="nf4 frozen",
        price=14,
        key="memory.frozen_weights",
        value="nf4",
        replaces=("full", "int8"),
        time="frozen layers are dequantized in every pass",
        quality="frozen layers rounded to 4 bits at each growth",
        loss="+0.010 (11M, 500k tokens, two seeds)",
        on_frozen=True,
    ),
    Rung(
        name="adapters on embeddings",
        price=17,
        key="plan.train_embeddings",
        value="adapters",
        replaces=("always",),
        quality="after stage 1, embeddings and head train only through adapters",
        loss="+0.191 (11M, 500k tokens, two seeds)",
        on_frozen=True,
    ),
    Rung(
        name="fused backward",
        price=18,
        key="memory.fused_backward",
        quality="clipping uses the previous step's norm, and every micro-batch is a step",
        loss="−0.006 with Muon, 8-bit states, no master weights (0.66M, 15 tokens per parameter, one seed)",
        needs=(("train.gradient_accumulation_steps", 1),),
    ),
)


# The first, or both, can be added to any prefix of the ladder. They leave the results of training unchanged, but in
# every step all trained parameters cross the bus and are updated on the CPU.
OFFLOADED = (
    Rung(
        name="optimizer in host memory",
        price=19,
        key="memory.offload_optimizer",
        time="gradients cross the bus once per micro-batch, and the update runs on the CPU",
        on_host=True,
    ),
    Rung(
        name="trained layers in host memory",
        price=21,
        key="memory.offload_weights",
        time="trained weights cross the bus twice per micro-batch, overlapping with computation",
        on_host=True,
        needs=(("memory.offload_optimizer", True),),
    ),
)
RUNGS = (*LADDER, *OFFLOADED)


def _nothing_else(config: RunConfig, value: int) -> Changes:
    return {}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A size to maximize. Its possible values are the multiples of a unit; an index is a number of units."""

    key: str
    largest: int  # index at which the search stops
    unit: Callable[[RunConfig], int] = lambda config: 1
    others: Callable[[RunConfig, int], Changes] = _nothing_else  # further changes that a value other than written needs

    def index(self, config: RunConfig) -> int:
        """The index of the value as written."""
        return int(written(config, self.key)) // self.unit(config)

    def value(self, config: RunConfig, index: int) -> int:
        return index * self.unit(config)

    def changes(self, config: RunConfig, index: int) -> Changes:
        """The configuration changes that set the value at an index."""
        value = self.value(config, index)
        return {} if value == written(config, self.key) else {self.key: value, **self.others(config, value)}


def _num_key_value_heads(config: RunConfig) -> int:
    return shape_from_hf_config(config.model.hf_config()).num_key_value_heads or config.model.num_attention_heads


def _with_width(config: RunConfig, hidden_size: int) -> Changes:
    model = config.model
    assert model.intermediate_size is not None  # as in every family that is counted by formula
    heads = hidden_size * model.num_attention_heads // model.hidden_size
    changes = {
        "model.intermediate_size": max(16, 16 * round(hidden_size * model.intermediate_size / model.hidden_size / 16)),
        "model.num_attention_heads": heads,
    }
    is_given = model.num_key_value_heads is not None or model.has_default_key_value_heads
    kv_heads = heads * _num_key_value_heads(config) // model.num_attention_heads
    return {**changes, "model.num_key_value_heads": kv_heads} if is_given else changes


def _with_batch(config: RunConfig, micro_batch: int) -> Changes:
    train = config.train
    if train.global_batch_size is not None:
        together = micro_batch * config.distributed.world_size
        return {"train.global_batch_size": together * max(1, round(train.global_batch_size / together))}
    micro_batches = train.per_device_train_batch_size * train.gradient_accumulation_steps / micro_batch
    return {"train.gradient_accumulation_steps": max(1, round(micro_batches))}


def _with_length(config: RunConfig, length: int) -> Changes:
    return {"model.max_position_embeddings": length} if length > config.model.max_position_embeddings else {}


AXES: dict[str, Axis] = {
    "depth": Axis(key="model.num_hidden_layers", largest=256),
    # Each unit is one more key-value head and its query heads, the fewest heads that can be added.
    "width": Axis(
        key="model.hidden_size",
        largest=4096,
        unit=lambda config: config.model.hidden_size // _num_key_value_heads(config),
        others=_with_width,
    ),
    "batch": Axis(key="train.per_device_train_batch_size", largest=2**16, others=_with_batch),
    # Each unit is the largest power of two, up to 64, that divides the written length: lengths stay hardware-friendly.
    "sequence": Axis(
        key="train.sequence_length",
        largest=2**24,
        unit=lambda config: math.gcd(64, config.train.sequence_length),
        others=_with_length,
    ),
}
