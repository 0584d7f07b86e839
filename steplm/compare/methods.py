"""Methods that a suite compares: each is a set of configuration keys for the same training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """The settings that define a method; every other key comes from the base configuration."""

    label: str
    settings: dict[str, Any] = field(default_factory=dict)


# The base's stages are meant for methods that grow, and its layers for that number of stages.
ONE_STAGE = {"method": "vanilla", "plan.num_stages": 1, "plan.layers": None}

METHODS: dict[str, Method] = {
    "vanilla": Method("vanilla", ONE_STAGE),  # ordinary pre-training: every parameter, AdamW
    "lora": Method("LoRA", {**ONE_STAGE, "method": "lora", "pet.method": "lora"}),
    "relora": Method(
        "ReLoRA",
        {
            **ONE_STAGE,
            "method": "relora",
            "pet.method": "lora",
            "pet.warm_start": 0.25,
            "pet.restarts": 3,
            "optim.schedule_over": "run",
        },
    ),
    "muon": Method("Muon", {**ONE_STAGE, "optim.name": "muon"}),
    "scale": Method("SCALE", {**ONE_STAGE, "optim.name": "scale"}),
    "galore": Method("GaLore", {**ONE_STAGE, "optim.name": "galore"}),
    "apollo": Method("APOLLO", {**ONE_STAGE, "optim.name": "apollo"}),
    "apollo_mini": Method("APOLLO-Mini", {**ONE_STAGE, "optim.name": "apollo_mini"}),
    "badam": Method("BAdam", {**ONE_STAGE, "method": "badam"}),
    "growth": Method("growth, nothing frozen", {"method": "growth"}),
    "stack": Method("stacking", {"method": "growth", "growth.operator": "stack", "growth.position": None}),
    "step": Method("STEP", {"method": "step"}),
    # Trains old layers with APOLLO-Mini instead of adapters; a method of this project.
    "step_thawed": Method(
        "STEP, thawed",
        {"method": "thawed", "optim.old_layers": "apollo_mini", "memory.master_weights": "adamw"},
    ),
}
