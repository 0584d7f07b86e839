"""The step loop of a phase, with logging, evaluation, and checkpointing between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from steplm.cost.measure import measure_peak
from steplm.errors import SteplmError
from steplm.schedule import Phase
from steplm.training.assemble import Assembled, PhaseStart
from steplm.training.context import RunContext
from steplm.training.environment import crowded_processors
from steplm.training.evaluate import evaluate, require_finite
from steplm.training.rates import last_stable_step, rate_of_step
from steplm.training.save import save
from steplm.training.spikes import highest_norm, with_norm
from steplm.training.step import StageLog, StepReport, StepResult, step_options, train_step, trial
from steplm.types import TrainState, to_json
from steplm.units import format_bytes

FAR_SLOWER = 3  # times slower than the stage's best speed; normal variation between steps is smaller


def train_phase(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> None:
    """Train until the phase's tokens are seen or a signal requests a stop."""
    config, world, log = run.config, run.world, start.log
    options = step_options(config, world)
    num_steps = phase.tokens // config.step_tokens
    stage_steps = sum(p.tokens for p in run.plan.schedule.stages[phase.stage - 1]) // config.step_tokens
    save_steps = config.train.save_steps or max(stage_steps // 5, 1)
    eval_steps = config.eval.eval_steps or max(stage_steps // 10, 1)
    stable_step = last_stable_step(config, run.plan.schedule) if phase.stage == run.plan.num_stages else None
    while start.progress.phase_step < num_steps and not run.stop_signal:
        progress = start.progress
        rate = rate_of_step(config, phase, progress.phase_step)
        # Seeded by position, so that dropout is the same after a resume. Replicas share a seed, because stochastic
        # rounding must give them the same weights.
        torch.manual_seed(config.seed * 1_000_003 + progress.tokens_seen + world.rows.index)
        batch = run.batches.batch(progress.tokens_seen)
        result = train_step(
            assembled.model,
            assembled.rules,
            batch,
            options,
            learning_rate=rate,
            max_grad_norm=config.optim.max_grad_norm,
            last_grad_norm=progress.grad_norm,
            highest_grad_norm=_highest_grad_norm(run, progress),
        )
        if not result.is_updated:
            _skip_or_stop(run, progress, result)
        start.progress = progress = _after_step(run, progress, result, num_steps)
        if progress.phase_done:
            assembled.rules.finish_updates()
        at_end = progress.step == stage_steps
        log.add(result)
        if log.unlogged_losses and (progress.step % config.log.logging_steps == 0 or at_end):
            _log_step(run, phase, progress, stage_steps, rate, log)
        paused_at = time.monotonic()
        if progress.step % eval_steps == 0 or at_end:
            evaluate(run, progress, assembled.model)
        run.agree_to_stop()
        is_due = progress.step % save_steps == 0 or at_end or progress.step == stable_step
        if is_due or run.stop_signal or _is_time_to_save(run):
            start.progress = replace(progress, stage_done=at_end)
            _save_tried(run, phase, start, assembled)
        log.logged_at += time.monotonic() - paused_at  # exclude the pause from the speed


def _highest_grad_norm(run: RunContext, progress: TrainState) -> float:
    """The highest gradient norm that is not a spike; infinite after ``max_skipped_steps`` skipped steps in a row."""
    optim = run.config.optim
    if progress.skipped_in_a_row >= optim.max_skipped_steps:
        return math.inf
    return highest_norm(progress.grad_norms, optim.skip_sigma_factor)


def _skip_or_stop(run: RunContext, progress: TrainState, result: StepResult) -> None:
    """Log a step skipped as a spike or non-finite, or stop if it cannot be skipped.

    Raises:
        TrainingDiverged: the step is not finite, and either ``optim.max_skipped_steps`` in a row were already skipped
            or its update has been applied.
    """
    was_updated = run.config.memory.fused_backward and math.isfinite(result.loss)
    is_too_many = progress.skipped_in_a_row >= run.config.optim.max_skipped_steps
    if not result.is_spike and (was_updated or is_too_many):
        require_finite(run, progress, result.loss, result.grad_norm)
    run.metrics.write(
        "skipped",
        stage=progress.stage_index,
        step=progress.step + 1,
        tokens_seen=progress.tokens_seen + run.config.step_tokens,
        loss=result.loss if math.isfinite(result.loss) else None,
        grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
        skipped_in_a_row=progress.skipped_in_a_row + 1,
    )
    run.display.note(
        f"step {progress.step + 1:,} skipped: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
    )


def _after_step(run: RunContext, progress: TrainState, result: StepResult, num_steps: int) -> TrainState:
    counts_norms = run.config.optim.skip_sigma_factor is not None
    return replace(
        progress,
        skipped_in_a_row=0 if result.is_updated else progress.skipped_in_a_row + 1,
        grad_norm=result.grad_norm if result.is_updated else progress.grad_norm,
        grad_norms=with_norm(progress.grad_norms, result.grad_norm) if counts_norms else (),
        step=progress.step + 1,
        phase_step=progress.phase_step + 1,
        tokens_seen=progress.tokens_seen + run.config.step_tokens,
        phase_done=progress.phase_step + 1 == num_steps,
    )


def _log_step(
    run: RunContext, phase: Phase, progress: TrainState, stage_steps: int, rate: float, log: StageLog
) -> None:
    now = time.monotonic()
    speed = log.steps_since * run.config.step_tokens / max(now - log.logged_at, 1e-9)
    mfu = run.mfu(run.plan.cost(phase).flops_per_token * speed)
    assert progress.grad_norm is not None  # there is a loss to log only after an updated step
    mean = StepResult(math.fsum(log.unlogged_losses) / len(log.unlogged_losses), progress.grad_norm)
    names = [split.partition("/")[2] for split in run.config.data.weights]
    by_source = {name: s.nats / s.tokens for name, s in zip(names, log.unlogged_sources, strict=False) if s.tokens}
    report = StepReport(phase, progress, stage_steps, mean, rate, speed, measure_peak(run.device), by_source, mfu)
    run.metrics.write(
        "train",
        stage=progress.stage_index,
        step=progress.step,
        num_steps=stage_steps,
        tokens_seen=progress.tokens_seen,
        loss=mean.loss,
        learning_rate=rate,
        grad_norm=mean.grad_norm,
        tokens_per_second=speed,
        **({} if mfu is None else {"mfu": mfu}),
        elapsed_seconds=run.elapsed_seconds,
        **to_json(report.peak),
        **{f"loss_{name}": loss for name, loss in report.source_losses.items()},
    )
    run.display.step(report)
    is_slow = run.device.type == "cpu" and speed < log.best_speed / FAR_SLOWER
    if is_slow and not log.told_of_load and (note := crowded_processors(speed, log.best_speed)):
        run.display.note(note)
        log.told_of_load = True
    log.best_speed = max(log.best_speed, speed)
    log.unlogged_losses.clear()
    log.unlogged_sources.clear()
    log.logged_at, log.steps_since = now, 0


def _is_time_to_save(run: RunContext) -> bool:
    """Whether ``train.save_minutes`` have passed on any rank's clock."""
    minutes = run.config.train.save_minutes
    return minutes is not None and run.world.any(time.monotonic() - run.saved_at >= 60 * minutes)


def _save_tried(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> None:
    """Save a checkpoint, after checking that its weights give a finite loss and gradient norm.

    The loss of a step says nothing about the weights its update produces. The new weights are therefore tried on the
    next sequence and, if that fails, on sequences from the following steps, up to ``optim.max_skipped_steps``.
    """
    progress, options = start.progress, step_options(run.config, run.world)
    for steps_ahead in range(run.config.optim.max_skipped_steps + 1):
        batch = run.loader.batch(progress.tokens_seen + steps_ahead * run.config.step_tokens, 1)
        loss, grad_norm = trial(assembled.model, assembled.rules, batch, options)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            break
    else:
        require_finite(run, progress, loss, grad_norm)
    if progress.stage_done:
        run.metrics.write("stage_end", stage=phase.stage, step=progress.step, tokens_seen=progress.tokens_seen)
    run.last_checkpoint = save(run, phase, start, assembled)
    run.saved_at = time.monotonic()


@contextmanager
def memory_errors(run: RunContext, phase: Phase) -> Iterator[None]:
    """Turn out-of-memory errors on any device into an error that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # PyTorch has no exception class for this on CPU.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        train, cost = run.config.train, run.plan.cost(phase)
        raise SteplmError(
            f"stage {phase.stage} ran out of memory ({str(error).splitlines()[0]}). Its model state takes "
            f"{format_bytes(cost.memory.total_bytes)}, and its planned peak, with micro-batches of "
            f"{train.per_device_train_batch_size} x {train.sequence_length} tokens, is "
            f"{format_bytes(cost.device_bytes) if cost.peak else 'not known'}. "
            "Lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps by the same factor, "
            "or set train.gradient_checkpointing=true or memory.offload_activations=true: the run then resumes where "
            "it is. For a new run, `steplm fit` lists what would fit.",
            stage=phase.stage,
            model_state_bytes=cost.memory.total_bytes,
        ) from None
