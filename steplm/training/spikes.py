"""Gradient-norm spikes: steps whose norm is far above that of the preceding steps.

Source: the skip-step optimizer of OLMo 2 (arXiv 2501.00656), which compares with a rolling mean and standard deviation.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev

WINDOW = 128  # steps in the rolling statistics
MIN_NORMS = WINDOW // 2  # with fewer, the statistics are unreliable


def highest_norm(norms: tuple[float, ...], sigma_factor: float | None) -> float:
    """The highest norm that is not a spike: ``mean + sigma_factor × standard deviation`` of the preceding norms."""
    if sigma_factor is None or len(norms) < MIN_NORMS:
        return math.inf
    return fmean(norms) + sigma_factor * pstdev(norms)


def with_norm(norms: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """Append a norm to the window; spikes are included, so a norm that stays high soon becomes the normal level."""
    return (*norms, norm)[-WINDOW:] if math.isfinite(norm) else norms
