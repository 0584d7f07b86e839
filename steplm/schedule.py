"""The training schedule: which layers are trained in each phase, and by which update rule.

A *stage* lasts from one growth to the next. A *phase* is a part of a stage during which all roles stay the same:
ordinary pre-training has one phase, STEP one per stage, ReLoRA one per restart, BAdam one per block. This module knows
nothing about memory or time.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

from steplm.types import LayerMap, ModelShape, to_json


@dataclass(frozen=True)
class Trained:
    """All weights are trained: by ``rule`` where it applies, otherwise by AdamW."""

    rule: str = "adamw"  # a key of ``steplm.cost.rules.RULES``
    kind: Literal["trained"] = "trained"


@dataclass(frozen=True)
class Adapter:
    """The weights are frozen, and an adapter on them is trained."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]  # last component of the module's name: "q_proj"
    method: str = "lora"
    rule: str = "adamw"  # for the adapter's own matrices
    kind: Literal["adapter"] = "adapter"

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Frozen:
    """Nothing is trained."""

    kind: Literal["frozen"] = "frozen"


Role = Trained | Adapter | Frozen


@dataclass(frozen=True)
class Entry:
    """How a phase gets its initial weights.

    fresh    initialized, or loaded from ``init_from``
    grow     adapters are merged, then ``operator`` creates the new layers of ``layer_map``
    merge    adapters are merged, and fresh ones replace them
    go_on    the weights stay the same; only roles change
    """

    kind: Literal["fresh", "grow", "merge", "go_on"]
    layer_map: LayerMap | None = None
    operator: str | None = None

    @property
    def warms_up_again(self) -> bool:
        """Whether the learning rate warms up from zero again."""
        return self.kind in ("grow", "merge")


@dataclass(frozen=True)
class Phase:
    """A range of steps during which all roles stay the same."""

    index: int  # from 1, in the schedule
    stage: int  # from 1
    entry: Entry
    layers: tuple[Role, ...]  # one per layer, bottom to top
    embeddings_and_head: Role  # includes the final norm, which stays trained under an Adapter
    tokens: int  # length of the phase
    scheduled_tokens: int  # length of the learning-rate schedule
    schedule_start_tokens: int  # tokens of the learning-rate schedule before this phase

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """Indices of the layers that the growth before this phase adds."""
        return () if self.entry.layer_map is None else self.entry.layer_map.new_layers

    @cached_property
    def trained_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose weights are trained."""
        return tuple(index for index, role in enumerate(self.layers) if isinstance(role, Trained))

    @cached_property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose weights are frozen, with or without an adapter."""
        return tuple(index for index, role in enumerate(self.layers) if not isinstance(role, Trained))

    @property
    def adapters(self) -> dict[int, Adapter]:
        """The adapter of each layer that has one."""
        return {index: role for index, role in enumerate(self.layers) if isinstance(role, Adapter)}

    @property
    def has_adapters(self) -> bool:
        return any(isinstance(role, Adapter) for role in (*self.layers, self.embeddings_and_head))

    @cached_property
    def groups(self) -> dict[Role, int]:
        """The distinct roles of layers, each with the number of layers that have it."""
        objects = Counter(map(id, self.layers))  # by identity first: there are few role objects, and hashing is slow
        roles = {id(role): role for role in self.layers}
        groups: dict[Role, int] = {}
        for key, count in objects.items():
            groups[roles[key]] = groups.get(roles[key], 0) + count
        return groups

    @cached_property
    def num_layers_without_backward(self) -> int:
        """Number of lowest layers that the backward pass does not reach: nothing in or below them is trained."""
        if not isinstance(self.embeddings_and_head, Frozen):
            return 0
        reached = (index for index, role in enumerate(self.layers) if not isinstance(role, Frozen))
        return next(reached, self.num_hidden_layers)


@dataclass(frozen=True)
class Schedule:
    """The phases of a run in chronological order, which training follows."""

    phases: tuple[Phase, ...]

    @cached_property
    def stages(self) -> tuple[tuple[Phase, ...], ...]:
        """The phases of each stage."""
        return tuple(tuple(phases) for _, phases in groupby(self.phases, key=lambda phase: phase.stage))

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of layers that each stage adds: n_1 … n_K."""
        depths = [phases[0].num_hidden_layers for phases in self.stages]
        return tuple(depth - before for depth, before in zip(depths, [0, *depths], strict=False))

    @property
    def total_tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    @property
    def hash(self) -> str:
        """Hash of all phases, as 16 hexadecimal digits."""
        return self.hash_until(len(self.phases))

    def hash_until(self, num_phases: int) -> str:
        """Hash of the first ``num_phases`` phases, which is equal for schedules that start with the same phases."""
        text = json.dumps([to_json(phase) for phase in self.phases[:num_phases]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def trained_patterns(phase: Phase, shape: ModelShape) -> tuple[str, ...]:
    """Shell-style patterns over the full names of the trained parameters.

    The last dot in ``model.layers.1.*`` keeps it from matching layer 11.
    """
    outside = phase.embeddings_and_head
    if isinstance(outside, Trained) and not phase.frozen_layers:
        return ("*",)
    if isinstance(outside, Trained):
        names = shape.outer_patterns
    else:
        names = tuple(f"{name}.*" for name in shape.final_norm_modules if isinstance(outside, Adapter))
    return (
        *(f"{shape.layer_prefix}.{layer}.*" for layer in phase.trained_layers),
        *(("*.lora_A", "*.lora_B") if phase.has_adapters else ()),
        *names,
    )
