"""The methods that a suite compares: each is a set of configuration keys, run by the one loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """What tells a method apart; every other key is the base's."""

    label: str
    settings: dict[str, Any] = field(default_factory=dict)


# What the base says of stages is for the methods that grow; what it says of layers, for its own number of stages.
ONE_STAGE = {"plan.num_stages": 1, "plan.layers": None}
ALL_UNDER_ADAPTERS = {**ONE_STAGE, "pet.method": "lora", "pet.layers": "all"}

METHODS: dict[str, Method] = {
    "vanilla": Method("vanilla", ONE_STAGE),  # ordinary pre-training: every parameter, AdamW
    # Adapters on fresh frozen layers from the start, arXiv 2106.09685.
    "lora": Method("LoRA", ALL_UNDER_ADAPTERS),
    # A full-rank start, then adapters that are merged and begun anew, arXiv 2307.05695.
    "relora": Method(
        "ReLoRA", {**ALL_UNDER_ADAPTERS, "pet.warm_start": 0.25, "pet.restarts": 3, "optim.schedule_over": "run"}
    ),
    "galore": Method("GaLore", {**ONE_STAGE, "optim.name": "galore"}),  # arXiv 2403.03507
    "apollo": Method("APOLLO", {**ONE_STAGE, "optim.name": "apollo"}),  # arXiv 2412.05270
    "apollo_mini": Method("APOLLO-Mini", {**ONE_STAGE, "optim.name": "apollo_mini"}),  # of rank 1, the same paper
    "badam": Method("BAdam", {**ONE_STAGE, "optim.name": "badam"}),  # one layer at a time, arXiv 2404.02827
    "growth": Method("growth, nothing frozen", {"plan.freeze_old_layers": False}),
    # The layers repeated on top, nothing frozen: G_stack, arXiv 2405.15319.
    "stack": Method("stacking", {"plan.freeze_old_layers": False, "growth.operator": "stack", "growth.position": None}),
    "step": Method("STEP"),  # old layers frozen under adapters, arXiv 2504.04151
    # Old layers trained on by APOLLO-Mini in place of adapters: this project's own.
    "step_thawed": Method(
        "STEP, thawed",
        {
            "plan.freeze_old_layers": False,
            "optim.name": "apollo_mini",
            "optim.low_rank_layers": "old",
            "memory.master_weights": "adamw",
        },
    ),
}
