"""The learning rate of every step of a phase, and the step where a run starts to decay it."""

from __future__ import annotations

from steplm.config import RunConfig
from steplm.optim.schedules import learning_rate
from steplm.schedule import Phase, Schedule


def rate_of_step(config: RunConfig, phase: Phase, phase_step: int) -> float:
    """The learning rate of a step of a phase; steps count from 0."""
    optim = config.optim
    _, start_step, scheduled_steps = _steps(config, phase)
    rises_again = start_step > 0 and phase.entry.warms_up_again
    return learning_rate(
        phase_step if rises_again else start_step + phase_step,
        num_steps=scheduled_steps,
        warmup_steps=round(config.warmup_ratio(phase.stage) * warmup_base(config, phase)),
        base_warmup_steps=round(config.warmup_ratio(1) * scheduled_steps),
        decay_steps=round(config.decay_ratio(phase.stage) * scheduled_steps),
        peak=config.learning_rate(phase.stage),
        start=start_step if rises_again else 0,
        min_ratio=optim.min_lr_ratio,
        kind=optim.lr_scheduler_type,
    )


def warmup_base(config: RunConfig, phase: Phase) -> int:
    """The number of steps that ``optim.warmup_ratio`` is a fraction of."""
    num_steps, start_step, scheduled_steps = _steps(config, phase)
    return num_steps if start_step > 0 and phase.entry.warms_up_again else scheduled_steps


def last_stable_step(config: RunConfig, schedule: Schedule) -> int | None:
    """Number of steps in the last stage before its learning rate decays; None if no stable phase precedes a decay."""
    if config.optim.lr_scheduler_type != "warmup_stable_decay":
        return None
    steps_before = 0
    for phase in schedule.stages[-1]:
        num_steps, start_step, scheduled_steps = _steps(config, phase)
        step = scheduled_steps - round(config.decay_ratio(phase.stage) * scheduled_steps) - start_step
        if 0 < step <= num_steps:
            return steps_before + step
        steps_before += num_steps
    return None


def _steps(config: RunConfig, phase: Phase) -> tuple[int, int, int]:
    """Steps in a phase, its first step within its learning-rate schedule, and the total steps of that schedule."""
    num_steps, start_step = phase.tokens // config.step_tokens, phase.schedule_start_tokens // config.step_tokens
    return num_steps, start_step, max(phase.scheduled_tokens // config.step_tokens, start_step + num_steps)
