"""Which learning rate of a grid is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """``at_edge``: the rate is the lowest or the highest that was tried, so that a better one may lie outside."""

    learning_rate: float
    at_edge: bool


def choose(losses: Mapping[float, float | None]) -> Choice | None:
    """The rate with the lowest final validation loss; the lower of two that are equal.

    Args:
        losses: nats a token by learning rate; ``None`` where the run diverged, which is worse than any loss.

    Returns:
        ``None`` where every run diverged.
    """
    finite = {rate: loss for rate, loss in sorted(losses.items()) if loss is not None and math.isfinite(loss)}
    if not finite:
        return None
    best = min(finite, key=lambda rate: finite[rate])
    return Choice(best, at_edge=best in (min(losses), max(losses)))
