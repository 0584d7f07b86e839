"""Steps whose gradient norm is far above that of the steps before: when one counts as a spike.

Source: the skip-step optimizer of OLMo 2 (arXiv 2501.00656), which compares with a rolling mean and standard deviation.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev

WINDOW = 128  # steps whose gradient norms are compared with
MIN_NORMS = WINDOW // 2  # fewer tell too little


def highest_norm(norms: tuple[float, ...], sigma_factor: float | None) -> float:
    """The highest gradient norm that is no spike: ``mean + sigma_factor × standard deviation`` of those before."""
    if sigma_factor is None or len(norms) < MIN_NORMS:
        return math.inf
    return fmean(norms) + sigma_factor * pstdev(norms)


def with_norm(norms: tuple[float, ...], norm: float) -> tuple[float, ...]:
    """The norms of the last steps. Spikes belong to them: a norm that stays high is soon the usual one."""
    return (*norms, norm)[-WINDOW:] if math.isfinite(norm) else norms
