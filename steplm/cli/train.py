"""``steplm train``."""

from __future__ import annotations

from steplm.config import RunConfig, load_config
from steplm.launch import is_launched, launched_size
from steplm.planner.plan import plan
from steplm.planner.shape import FAMILIES


def run_train(run: str, overrides: list[str]) -> int:
    if is_launched():
        overrides = [*overrides, f"distributed.world_size={launched_size()}"]
    config = load_config(run, overrides)
    _refuse_early(config)
    from steplm.training.run import train

    result = train(config)
    return 0 if result.stop_signal is None else 128 + result.stop_signal


def _refuse_early(config: RunConfig) -> None:
    """A plan over its budget, before torch is loaded and anything is written; a begun run has its own layers."""
    if config.model.model_type in FAMILIES and not (config.run_dir / "plan.json").exists():
        plan(config)
