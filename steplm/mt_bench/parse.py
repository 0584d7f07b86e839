"""What a judge's reply says, by the published rules."""

from __future__ import annotations

import re
from collections.abc import Callable

LOWEST, HIGHEST = 1, 10
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}


def rating(reply: str) -> float | None:
    """The first number in double brackets, else the first in single ones; ``None`` where there is none in 1 … 10."""
    for pattern in _RATINGS:
        if match := pattern.search(reply):
            value = float(match.group(1))
            return value if LOWEST <= value <= HIGHEST else None
    return None


def verdict(reply: str) -> str | None:
    """``A``, ``B`` or ``tie``; of several verdicts in one reply the first in this order, as published."""
    return next((value for mark, value in _VERDICTS.items() if mark in reply), None)


PARSERS: dict[str, Callable[[str], float | str | None]] = {"single": rating, "pairwise": verdict}
