"""Extend a run: start a longer run, or a learning-rate decay, from a checkpoint of a shorter run.

The longer run must be able to reach the checkpoint on its own: the phases and the learning rate of every step up to
that point must match. Learning-rate schedules with a stable phase satisfy this until their decay starts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from steplm.checkpoint import CheckpointState, verify_checkpoint
from steplm.checkpoint.folder import load_checkpoint_state
from steplm.config import RunConfig, changed, token_budget
from steplm.errors import CheckpointError, CheckpointMismatch, ConfigError
from steplm.models.shape import shape_of
from steplm.planner.plan import Plan
from steplm.planner.plan import plan as make_plan
from steplm.training.branch import begin_from, logged_until
from steplm.training.checks import FREE_AT_RESUME, differing_keys, is_one_of
from steplm.training.folder import RunFolder
from steplm.training.rates import rate_of_step, warmup_base

# Not compared key by key: their effect before the checkpoint shows in the schedule and learning-rate comparison.
COMPARED_BY_STEP = (
    "plan",
    "optim.learning_rate",
    "optim.lr_scheduler_type",
    "optim.warmup_ratio",
    "optim.decay_ratio",
    "optim.min_lr_ratio",
)


def extended(config: RunConfig, source_run_dir: str | Path) -> tuple[RunConfig, Path]:
    """Return the config of a longer run and the latest checkpoint of the source run that it can start from.

    Earlier stages keep their token counts, and every stage keeps its number of warmup steps.

    Args:
        config: the source run's config, with more tokens and its own ``output_dir``.

    Raises:
        ConfigError: the config does not have more tokens, or it has the same run directory.
        CheckpointMismatch: the longer run would reach none of the checkpoints; the message says why.
    """
    source = RunFolder.open(Path(source_run_dir))
    begun_with = _begun_with(source)
    _require_another_folder(config, source)
    wanted, before = _plan(config), source.plan.total_tokens
    if wanted.num_stages != source.plan.num_stages:
        raise ConfigError(
            f"an extended run keeps its number of stages: {source.path} has {source.plan.num_stages}, and the longer "
            f"run {wanted.num_stages}.",
            num_stages=wanted.num_stages,
        )
    total_tokens = wanted.total_tokens
    if total_tokens <= before:
        raise ConfigError(
            f"{source.path} is planned for {before:,} tokens, and the longer run for {total_tokens:,}: set "
            f"plan.total_tokens to more than {before:,}.",
            total_tokens=total_tokens,
        )
    longer = _with_tokens(config, begun_with, source.plan, total_tokens)
    after, reasons = _plan(longer), []
    for checkpoint in reversed(source.checkpoints):
        problem = _difference(begun_with, source.plan, load_checkpoint_state(checkpoint), longer, after)
        if problem is None:
            return longer, checkpoint
        reasons.append(f"{checkpoint.name}: {problem}")
    raise CheckpointMismatch(
        f"a run of {total_tokens:,} tokens would have none of the checkpoints of {source.path}: {reasons[-1]}. Only a "
        "run with a stable learning rate can be extended (optim.lr_scheduler_type=wsd), from before its decay.",
        path=str(source.path),
        reasons=reasons,
    )


def decayed(checkpoint: str | Path, tokens: int, output_dir: str | Path) -> RunConfig:
    """Return the config of a run that decays the learning rate over the given tokens after a checkpoint, then ends.

    Args:
        checkpoint: a checkpoint from the last stage of a run.
        tokens: rounded to whole steps.
        output_dir: output directory of the new run.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the checkpoint is from an earlier stage.
    """
    checkpoint = Path(checkpoint)
    source = RunFolder.open(checkpoint.parent.parent)
    if checkpoint.resolve() not in {path.resolve() for path in source.checkpoints}:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint of a run. `ls {source.path / 'checkpoints'}` shows those there "
            "are.",
            path=str(checkpoint),
        )
    config, progress = _begun_with(source), load_checkpoint_state(checkpoint).progress
    num_stages = source.plan.num_stages
    if progress.stage_index != num_stages:
        raise ConfigError(
            f"{checkpoint} is within stage {progress.stage_index} of {num_stages}: only the last stage makes a "
            "finished model. Give a checkpoint of that.",
            stage=progress.stage_index,
        )
    num_steps = max(round(tokens / config.step_tokens), 1)
    decay_tokens = num_steps * config.step_tokens
    config = config.model_copy(update={"name": Path(output_dir).name, "output_dir": str(output_dir)})
    _require_another_folder(config, source)
    longer = _with_tokens(config, config, source.plan, progress.tokens_seen + decay_tokens)
    scheduled = _plan(longer).schedule.phases[-1].scheduled_tokens
    ratios = [config.decay_ratio(stage) for stage in range(1, num_stages)]
    return changed(
        longer,
        {
            "optim.lr_scheduler_type": "warmup_stable_decay",
            "optim.decay_ratio": _one_or_per_stage([*ratios, decay_tokens / scheduled]),
        },
    )


def begin_with(checkpoint: Path, config: RunConfig) -> Path:
    """Copy a checkpoint of a shorter run, and its log up to that point, into a run that has not started.

    Returns:
        The checkpoint in ``config.run_dir``.

    Raises:
        CheckpointMismatch: the run would not have reached this checkpoint.
        CheckpointError: the checkpoint or the log is missing or damaged.
    """
    source = RunFolder.open(checkpoint.parent.parent)
    verify_checkpoint(checkpoint)
    state, plan = load_checkpoint_state(checkpoint), _plan(config)
    begun_with = _begun_with(source)
    if problem := _difference(begun_with, source.plan, state, config, plan):
        way_out = "Choose a checkpoint from before the decay."
        if begun_with.optim.lr_scheduler_type == "cosine":
            way_out = "A cosine schedule decays from its first step: train with optim.lr_scheduler_type=wsd instead."
        raise CheckpointMismatch(
            f"{config.run_dir} cannot continue from {checkpoint}: {problem}. {way_out}",
            path=str(checkpoint),
        )
    phase, progress = plan.schedule.phases[state.progress.phase_index - 1], state.progress
    history = logged_until(source.path, state)
    if progress.phase_done and progress.phase_step * config.step_tokens < phase.tokens:  # the longer run continues
        last_line = history[history.rstrip().rfind(b"\n") + 1 :]
        if json.loads(last_line)["event"] == "stage_end":
            history = history.removesuffix(last_line)
        progress, state = replace(progress, phase_done=False, stage_done=False), replace(state, probe_loss=None)
    state = replace(
        state,
        progress=progress,
        phase=phase,
        schedule_hash=plan.schedule.hash_until(phase.index),
        metrics_bytes=len(history),
    )
    return begin_from(checkpoint, config, state, history)


def has_begun(config: RunConfig) -> bool:
    """Whether the run already has a checkpoint of its own or is finished."""
    folder = RunFolder.open(config.run_dir)
    return folder.finished or bool(folder.checkpoints)


def _difference(
    begun_with: RunConfig, before: Plan, state: CheckpointState, config: RunConfig, after: Plan
) -> str | None:
    """Why a run of ``config`` would not have reached this checkpoint; None if it would."""
    changed = [
        change
        for key, change in differing_keys(begun_with, config).items()
        if not is_one_of(key, COMPARED_BY_STEP) and (key.startswith("optim.") or not is_one_of(key, FREE_AT_RESUME))
    ]
    if changed:
        return f"the configurations differ ({', '.join(changed[:5])})"
    if config.step_tokens != begun_with.step_tokens:
        return f"a step has {begun_with.step_tokens:,} tokens there and {config.step_tokens:,} here"
    progress = state.progress
    for old, new in zip(before.schedule.phases, after.schedule.phases[: progress.phase_index], strict=False):
        is_last = old.index == progress.phase_index
        num_steps = progress.phase_step if is_last else old.tokens // config.step_tokens
        tokens = old.tokens if is_last else new.tokens
        alike = replace(new, scheduled_tokens=old.scheduled_tokens, tokens=tokens) == old
        if not alike or num_steps * config.step_tokens > new.tokens:
            return f"phase {old.index} of the schedule has {old.tokens:,} tokens there and {new.tokens:,} here"
        continues = is_last and progress.phase_done and num_steps * config.step_tokens < new.tokens
        if continues and config.memory.delay_update:
            return "the last update of a stage is not delayed there, but memory.delay_update delays it here"
        for step in range(num_steps):
            rates = [rate_of_step(begun_with, old, step), rate_of_step(config, new, step)]
            if rates[0] != rates[1]:
                stage = f" of stage {old.stage}" if before.num_stages > 1 else ""
                there, here = (f"{rate:.3g}" for rate in rates)
                if there == here:
                    there, here = map(repr, rates)
                return f"step {step + 1}{stage} had learning rate {there} there, and has {here} here"
    return None


def _with_tokens(config: RunConfig, begun_with: RunConfig, before: Plan, total_tokens: int) -> RunConfig:
    """Set the total tokens; keep every stage's warmup steps and the tokens of all stages but the last."""
    earlier = [stage.tokens for stage in before.stages[:-1]]
    per_stage = [*earlier, total_tokens - sum(earlier)]
    budget = {"tokens_per_stage": per_stage} if earlier else {"total_tokens": total_tokens}
    longer = changed(config, token_budget(**budget))
    ratios = []
    for stage, (old, new) in enumerate(zip(before.schedule.stages, _plan(longer).schedule.stages, strict=True), 1):
        base, longer_base = warmup_base(begun_with, old[0]), warmup_base(longer, new[0])
        ratio = begun_with.warmup_ratio(stage)
        ratios.append(ratio if base == longer_base else round(ratio * base) / longer_base)
    return changed(longer, {"optim.warmup_ratio": _one_or_per_stage(ratios)})


def _one_or_per_stage(ratios: list[float]) -> float | list[float]:
    return ratios[0] if len(set(ratios)) == 1 else ratios


def _begun_with(source: RunFolder) -> RunConfig:
    if source.written is None or not source.checkpoints:
        raise CheckpointError(f"{source.path} is not a run directory with a checkpoint", path=str(source.path))
    return source.written


def _require_another_folder(config: RunConfig, source: RunFolder) -> None:
    if config.run_dir.resolve() == source.path.resolve():
        raise ConfigError(
            f"the longer run needs a directory of its own, as {source.path} stays as it is: set name or output_dir.",
            output_dir=str(source.path),
        )


def _plan(config: RunConfig) -> Plan:
    return make_plan(config, shape_of(config.model.hf_config()))
