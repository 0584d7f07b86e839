"""What a judge's reply says: by FastChat's rules, or by the last rating outside of its thoughts."""

from __future__ import annotations

import re
from typing import Literal

LOWEST, HIGHEST = 1, 10
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)

Which = Literal["first", "last"]  # rating or verdict of a reply: FastChat's rule, or the last outside of <think>


def parsed(kind: str, reply: str, which: Which = "first") -> float | str | None:
    """The rating of a ``single`` reply or the verdict of a ``pairwise`` one; ``None`` where there is none."""
    if which == "last":
        reply = without_thoughts(reply)
    return rating(reply, which) if kind == "single" else verdict(reply, which)


def rating(reply: str, which: Which = "first") -> float | None:
    """The first (last) number in double brackets, else in single ones; ``None`` where there is none in 1 … 10."""
    for pattern in _RATINGS:
        if found := pattern.findall(reply):
            value = float(found[0 if which == "first" else -1])
            return value if LOWEST <= value <= HIGHEST else None
    return None


def verdict(reply: str, which: Which = "first") -> str | None:
    """``A``, ``B`` or ``tie``. Of several the last, or, by FastChat's rule, the first in this order."""
    found = [mark for mark in _VERDICTS if mark in reply]
    if which == "last":
        found.sort(key=reply.rfind, reverse=True)
    return _VERDICTS[found[0]] if found else None


def without_thoughts(reply: str) -> str:
    """The reply without its ``<think>`` blocks. One that ends at the limit of tokens may lack the closing mark, and one
    whose chat template opens the block lacks the opening one."""
    return _THOUGHTS.sub("", reply).rpartition("</think>")[2]
