"""The learning rate of a step, as a pure function. Steps count from 0 within a stage or a restart."""

from __future__ import annotations

import math
from collections.abc import Callable

from steplm.errors import ConfigError

# Each returns the learning rate of a step after the warmup as a fraction of the peak, 1 … min_ratio.
# Arguments: steps done since the warmup, steps after the warmup, decay steps, min_ratio.


def _cosine(done: int, total: int, decay_steps: int, min_ratio: float) -> float:
    progress = done / max(1, total - 1)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _warmup_stable_decay(done: int, total: int, decay_steps: int, min_ratio: float) -> float:
    # The last step is at min_ratio, so the first of d decay steps is 1/d of the way down.
    decay_done = done - (total - decay_steps) + 1
    return 1.0 if decay_done <= 0 else 1 - (1 - min_ratio) * decay_done / decay_steps


def _constant_with_warmup(done: int, total: int, decay_steps: int, min_ratio: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "cosine": _cosine,
    "warmup_stable_decay": _warmup_stable_decay,
    "constant_with_warmup": _constant_with_warmup,
}


def learning_rate(
    step: int,
    *,
    num_steps: int,
    warmup_steps: int,
    peak: float,
    min_ratio: float,
    kind: str,
    decay_steps: int = 0,
    start: int = 0,
    base_warmup_steps: int | None = None,
) -> float:
    """The learning rate of one step.

    It rises linearly over the warmup, ``(step + 1) / warmup_steps`` of the peak, then follows the schedule. ``cosine``
    and ``warmup_stable_decay`` reach ``min_ratio * peak`` at the last step and stay there.

    A later part of the schedule, which begins at ``start``, warms up again from zero to the curve: during its own
    warmup, the rate is ``(step + 1) / warmup_steps`` of the schedule's value at that step. This is the jagged schedule
    of ReLoRA (arXiv 2307.05695), section 3. The parts of one schedule can differ in ``start`` alone.

    Args:
        step: optimizer step within this part, from 0.
        num_steps: scheduled steps, including all parts and the warmup.
        warmup_steps: warmup steps of this part.
        peak: highest learning rate.
        min_ratio: last learning rate / peak.
        kind: a key of ``SCHEDULES``.
        decay_steps: steps of the final decay; used only by ``warmup_stable_decay``.
        start: steps of the schedule before this part.
        base_warmup_steps: warmup steps of the first part, after which the schedule proper begins; used only if
            ``start`` is not 0. None: the same as this part's.

    Raises:
        ConfigError: unknown kind.
    """
    if start > 0:
        on_the_curve = learning_rate(
            start + step,
            num_steps=num_steps,
            warmup_steps=warmup_steps if base_warmup_steps is None else base_warmup_steps,
            peak=peak,
            min_ratio=min_ratio,
            kind=kind,
            decay_steps=decay_steps,
        )
        return on_the_curve * min(1.0, (step + 1) / max(1, warmup_steps))
    if kind not in SCHEDULES:
        raise ConfigError(f"no learning-rate schedule {kind!r}. Known: {', '.join(SCHEDULES)}.", kind=kind)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    total = max(1, num_steps - warmup_steps)
    done = min(step - warmup_steps, total - 1)
    return peak * SCHEDULES[kind](done, total, min(decay_steps, total), min_ratio)
