"""``steplm train``."""

from __future__ import annotations

from pathlib import Path

from steplm.cli.loading import load_torch
from steplm.config import RunConfig
from steplm.launch import is_launched, launched_size
from steplm.planner.auto import load_config
from steplm.planner.plan import plan
from steplm.planner.shape import FAMILIES
from steplm.units import parse_count


def run_train(run: str, overrides: list[str], extend: Path | None = None) -> int:
    if is_launched():
        overrides = [*overrides, f"distributed.world_size={launched_size()}"]
    config = load_config(run, overrides)
    begin = None
    if extend is not None:
        load_torch()
        from steplm.training.extend import extended

        config, begin = extended(config, extend)
    # Reject a plan over its budget before torch is imported and files are written; a started run has its own plan.
    if config.model.model_type in FAMILIES and not (config.run_dir / "plan.json").exists():
        plan(config)
    return _train(config, begin)


def run_decay(checkpoint: Path, tokens: str, output: Path | None) -> int:
    """Train a run that decays from the checkpoint and ends ``tokens`` tokens after it."""
    load_torch()
    from steplm.training.extend import decayed

    run_dir = checkpoint.resolve().parent.parent
    output = output or run_dir.with_name(f"{run_dir.name}-decay-{checkpoint.name}")
    return _train(decayed(checkpoint, parse_count(tokens), output), checkpoint)


def _train(config: RunConfig, begin: Path | None) -> int:
    load_torch()
    from steplm.training.run import train

    result = train(config, begin=begin)
    return 0 if result.stop_signal is None else 128 + result.stop_signal
