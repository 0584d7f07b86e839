"""Keys of earlier versions: refused in a user's config, stating the new spelling, and translated in old runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from steplm.errors import ConfigError

# (section, key) -> old value -> new spelling
RENAMED: dict[tuple[str, str], dict[Any, str]] = {
    ("plan", "freeze_old_layers"): {False: "method=growth", True: "method=step, the default"},
    ("pet", "layers"): {"all": "method=lora, or method=relora with pet.restarts", "old": "the default: leave it out"},
    ("optim", "name"): {"badam": "method=badam"},
    ("optim", "low_rank_layers"): {
        "old": "method=thawed, with optim.old_layers in place of optim.name",
        "all": "the default: leave it out",
    },
}


def refuse_old_keys(values: Mapping[str, Any]) -> None:
    """Refuse keys and values that earlier versions spelled differently.

    Raises:
        ConfigError: there are any; the message gives the new spelling of each.
    """
    found = []
    for (section, key), new in RENAMED.items():
        written = values.get(section)
        if not isinstance(written, Mapping) or key not in written or not isinstance(written[key], str | bool):
            continue
        value = written[key]
        if value in new:
            told = str(value).lower() if isinstance(value, bool) else value
            found.append(f"{section}.{key}={told} is now {new[value]}.")
    if found:
        raise ConfigError(" ".join(found), keys=found)


def translate_old_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the complete configuration of a run of an earlier version to the current keys."""
    new: dict[str, Any] = copy.deepcopy(dict(values))
    plan, pet, optim = (new.get(section) or {} for section in ("plan", "pet", "optim"))
    if "method" in new or "freeze_old_layers" not in plan:
        return new
    freezes_old, adapted = plan.pop("freeze_old_layers"), pet.pop("layers", "old")
    low_rank = optim.pop("low_rank_layers", "all")
    if adapted == "all":
        new["method"] = "relora" if pet.get("restarts") or pet.get("warm_start") else "lora"
    elif optim.get("name") == "badam":
        new["method"], optim["name"] = "badam", "adamw"
    elif low_rank == "old":
        new["method"], optim["old_layers"], optim["name"] = "thawed", optim["name"], "adamw"
    else:
        one_stage = plan.get("num_stages") == 1
        new["method"] = "vanilla" if one_stage else "step" if freezes_old else "growth"
    if new["method"] in ("vanilla", "badam"):
        plan["train_embeddings"] = "always"  # not used by any phase
    return new
