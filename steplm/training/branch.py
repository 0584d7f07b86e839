"""Branching: start a run from another run's end-of-stage checkpoint if both share their first stages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from steplm.checkpoint import CheckpointState, checkpoint_name, copy_checkpoint, verify_checkpoint
from steplm.checkpoint.folder import complete_checkpoints, load_checkpoint_state
from steplm.config import RunConfig
from steplm.data.prepare import with_prepared_dir
from steplm.errors import CheckpointError, CheckpointMismatch
from steplm.models.shape import shape_of
from steplm.planner.plan import Plan
from steplm.planner.plan import plan as make_plan
from steplm.training.checks import flat, is_one_of
from steplm.training.folder import RunFolder
from steplm.types import TrainState

# Keys and sections that leave a stage's weights bitwise unchanged, or that ``stage_keys`` covers through the schedule
# or separately.
NOT_COMPARED = (
    "name", "output_dir", "method", "eval", "log", "train.dry_run", "train.save_steps", "train.save_minutes",
    "train.save_total_limit", "data.num_workers", "memory.reserve", "memory.correction",
    "plan", "pet", "growth", "model.num_hidden_layers", "optim.schedule_over", "optim.old_layers",
    "optim.learning_rate", "optim.keep_state_at_growth",
)  # fmt: skip


def stage_keys(config: RunConfig, plan: Plan) -> tuple[str, ...]:
    """One key for the end of each stage; runs with equal keys have bitwise equal checkpoints there.

    A key covers the stage, all earlier stages, and every configuration key that they read.
    """
    values = flat(with_prepared_dir(config).model_dump(mode="json"))
    common = {key: value for key, value in values.items() if not is_one_of(key, NOT_COMPARED)}
    keys, schedule = [], plan.schedule
    for stage, phases in enumerate(schedule.stages, start=1):
        own: dict[str, Any] = {"schedule": schedule.hash_until(phases[-1].index)}
        own["learning_rates"] = [config.learning_rate(earlier) for earlier in range(1, stage + 1)]
        if phases[-1].index > 1:
            own["begin"] = [
                config.optim.keep_state_at_growth,
                config.growth.optimizer_states,
                config.pet.restart_keep,
            ]
        text = json.dumps({**common, **own}, sort_keys=True)
        keys.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return tuple(keys)


def stage_end(stage_index: int) -> str:
    """The name of the checkpoint at the end of a stage."""
    return checkpoint_name(TrainState(stage_index, 0, 0, 0, 0, stage_done=True))


def branch(source_run_dir: str | Path, stage_index: int, config: RunConfig) -> Path:
    """Copy the end-of-stage checkpoint of another run, and its log up to there, into a run that has not started.

    ``train(config)`` then continues from there as if it had trained those stages itself. Files are hard-linked if the
    file system supports it, else copied.

    Args:
        source_run_dir: a run directory where the stage is done, with the same ``stage_keys`` up to that stage.
        stage_index: stage number, from 1.

    Returns:
        The checkpoint in ``config.run_dir``.

    Raises:
        CheckpointMismatch: the run has already started, or its ``stage_keys`` differ.
        CheckpointError: the source's checkpoint, or its log up to there, is missing or damaged.
    """
    source = Path(source_run_dir) / "checkpoints" / stage_end(stage_index)
    if complete_checkpoints(config.run_dir / "checkpoints"):
        raise CheckpointMismatch(f"{config.run_dir} has begun already, and cannot branch off", path=str(config.run_dir))
    verify_checkpoint(source)
    _check_same_beginning(Path(source_run_dir), stage_index, config)
    state = load_checkpoint_state(source)
    return begin_from(source, config, state, logged_until(Path(source_run_dir), state))


def begin_from(checkpoint: Path, config: RunConfig, state: CheckpointState, history: bytes) -> Path:
    """Copy a checkpoint and a log into a run that has not started; return the copy."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "metrics.jsonl").write_bytes(history)
    return copy_checkpoint(checkpoint, config.run_dir / "checkpoints", state)


def logged_until(run_dir: Path, state: CheckpointState) -> bytes:
    """The log of a run as of the time it wrote a checkpoint.

    Raises:
        CheckpointError: the log is now shorter than it was then.
    """
    log = run_dir / "metrics.jsonl"
    history = log.read_bytes()[: state.metrics_bytes] if log.is_file() else b""
    if len(history) < state.metrics_bytes:
        raise CheckpointError(f"{log} has lost what was logged up to {checkpoint_name(state.progress)}", path=str(log))
    return history


def _check_same_beginning(source_run_dir: Path, stage_index: int, config: RunConfig) -> None:
    source = RunFolder.open(source_run_dir)
    theirs = () if source.written is None else stage_keys(source.written, source.plan)
    ours = stage_keys(config, make_plan(config, shape_of(config.model.hf_config())))
    if ours[:stage_index] != theirs[:stage_index]:
        raise CheckpointMismatch(
            f"{config.run_dir} cannot branch off from {source_run_dir} after stage {stage_index}: their configurations "
            "differ in what trains the stages before it.",
            source=str(source_run_dir),
            stage=stage_index,
        )
