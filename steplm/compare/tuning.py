"""Choose the best learning rate of a grid, and the rates to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Choice:
    """``at_edge``: the rate is the lowest or highest tried, so a better one may lie outside the grid."""

    learning_rate: float
    at_edge: bool = False


def beyond(losses: Mapping[float, float | None]) -> float | None:
    """If the best rate is at an edge, the next rate beyond it, by the ratio of the two rates there; else ``None``."""
    choice, rates = choose(losses), sorted(losses)
    if choice is None or not choice.at_edge or len(rates) < 2:
        return None
    edge, inner = (rates[0], rates[1]) if choice.learning_rate == rates[0] else (rates[-1], rates[-2])
    return _further(edge, inner)


def between(losses: Mapping[float, float | None]) -> tuple[float, ...]:
    """Rates halfway, by ratio, between the best rate and its neighbors."""
    choice, rates = choose(losses), sorted(losses)
    if choice is None:
        return ()
    place = rates.index(choice.learning_rate)
    neighbors = (*rates[max(place - 1, 0) : place], *rates[place + 1 : place + 2])
    return tuple(_halfway(choice.learning_rate, neighbor) for neighbor in neighbors)


def reachable(grid: Sequence[float], extend: int, refine: int = 0) -> tuple[float, ...]:
    """All rates reachable by extending and then refining a grid this many times, in ascending order."""
    rates = sorted(grid)
    if len(rates) < 2:
        return tuple(rates)
    lower, higher = rates[:2][::-1], rates[-2:]
    for _ in range(extend):
        lower.append(_further(lower[-1], lower[-2]))
        higher.append(_further(higher[-1], higher[-2]))
    rates = sorted({*rates, *lower, *higher})
    for _ in range(refine):
        rates = sorted({*rates, *(_halfway(one, other) for one, other in pairwise(rates))})
    return tuple(rates)


def best(losses: Mapping[float, float | None], count: int) -> tuple[float, ...]:
    """Up to ``count`` rates with the lowest losses, best first; ties go to the lower rate."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return tuple(sorted(finite, key=lambda rate: (finite[rate], rate))[:count])


# Round rates to what one would write: 0.0005, not 0.0005000000000000001.


def _further(edge: float, inner: float) -> float:
    return _written(edge * edge / inner)


def _halfway(one: float, other: float) -> float:
    return _written(math.sqrt(one * other))


def _written(rate: float) -> float:
    return float(f"{min(max(rate, 1e-300), 1e300):.3g}")  # outside, the next step would be zero or infinite


def choose(losses: Mapping[float, float | None], means: Mapping[float, float | None] | None = None) -> Choice | None:
    """The rate with the lowest final validation loss; ties go to the lower rate.

    Args:
        losses: nats per token by learning rate; ``None`` if the run diverged, which is worse than any loss.
        means: mean losses over several seeds, for the rates to choose from; default: choose by ``losses``.

    Returns:
        ``None`` if every run diverged.
    """
    lowest = best(losses if means is None else means, 1)
    return Choice(lowest[0], at_edge=lowest[0] in (min(losses), max(losses))) if lowest else None
