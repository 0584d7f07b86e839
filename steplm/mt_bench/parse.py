"""Parses a judge's reply: by FastChat's rules, or by the last rating outside its ``<think>`` blocks."""

from __future__ import annotations

import re
from typing import Literal

LOWEST, HIGHEST = 1, 10
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)

Which = Literal["first", "last"]  # rating or verdict that counts: FastChat's rule, or the last one outside <think>


def parsed(kind: str, reply: str, which: Which = "first") -> float | str | None:
    """The rating of a ``single`` reply or the verdict of a ``pairwise`` one; ``None`` if there is none."""
    if which == "last":
        # A block cut off at the token limit lacks its closing tag; one opened by the chat template, its opening tag.
        reply = _THOUGHTS.sub("", reply).rpartition("</think>")[2]
    return rating(reply, which) if kind == "single" else verdict(reply, which)


def rating(reply: str, which: Which = "first") -> float | None:
    """The first or last number in double brackets, else in single ones; ``None`` unless it is within 1 … 10."""
    for pattern in _RATINGS:
        if found := pattern.findall(reply):
            value = float(found[0 if which == "first" else -1])
            return value if LOWEST <= value <= HIGHEST else None
    return None


def verdict(reply: str, which: Which = "first") -> str | None:
    """``A``, ``B`` or ``tie``; of several, the last or, by FastChat's rule, the first in this order."""
    found = [mark for mark in _VERDICTS if mark in reply]
    if which == "last":
        found.sort(key=reply.rfind, reverse=True)
    return _VERDICTS[found[0]] if found else None
