"""Parse and format numbers such as ``"24GiB"`` and ``"10B"`` tokens, and format values and errors for messages."""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "p": 10**15, "e": 10**18, "z": 10**21}
_NUMBER_AND_UNIT = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*$", re.IGNORECASE)
_MOST_DIGITS = 30  # more than any number of bytes or tokens has


def _parse(value: str | int | float, units: dict[str, int], example: str, *, round_down: bool = False) -> int:
    """Parse a number with a unit; ``round_down`` allows values with a unit that are not whole, such as ``23.6GiB``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number such as {example}")
    number, unit = value, ""
    if isinstance(value, str):
        match = _NUMBER_AND_UNIT.match(value)
        if match is None or match.group(2).lower() not in units:
            known = ", ".join(unit for unit in units if unit)
            raise ValueError(f"cannot read {shortened(value)}: expected a number such as {example} (units: {known})")
        number, unit = match.group(1).replace("_", "").replace(",", ""), match.group(2).lower()
    result = Decimal(number)
    if not result.is_finite() or (result and abs(result.adjusted()) > _MOST_DIGITS):
        raise ValueError(f"{shortened(value)} is not a whole number of at most {_MOST_DIGITS} digits")
    result *= units[unit]
    if result != int(result) and not (unit and round_down):
        raise ValueError(f"{shortened(value)} is {float(result)}, not a whole number")
    return int(result)


def parse_bytes(value: str | int | float) -> int:
    """Parse bytes from ``24GiB`` (2**30), ``24GB`` (10**9) or a plain number; ``23.6GiB`` is rounded down.

    Raises:
        ValueError: the text is not a number with a known unit.
    """
    return _parse(value, _BYTE_UNITS, "'24GiB'", round_down=True)


def parse_count(value: str | int | float) -> int:
    """Parse a count from ``10B`` (10**9), ``2.5M``, ``1e18`` or a plain number.

    Raises:
        ValueError: the text is not a whole number with a known unit.
    """
    return _parse(value, _COUNT_UNITS, "'10B'")


def shortened(value: Any, most: int = 80) -> str:
    """The ``repr`` of a value for a message, with the middle cut out if it is longer than ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most * 3 // 4]}…{text[len(text) - most // 4 :]}"


def as_yaml(value: Any) -> str:
    """A value as it is written in an override: ``null``, ``true``, ``0.5``, ``[3,3]``."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def nearest(name: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """A hint to end a message about an unknown name: the closest known name, else ``otherwise`` (default: list all)."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(names)}." if otherwise is None else otherwise


def reason(error: BaseException) -> str:
    """A parser's error message in one line; for pydantic errors, the first problem and its location."""
    problems = error.errors(include_url=False) if hasattr(error, "errors") else []
    if not problems:
        first_line = str(error).strip().partition("\n")[0]
        return _printable(first_line[:300]) or type(error).__name__
    where = ".".join(str(part)[:40] for part in problems[0]["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _printable(f"{where or 'the whole'}: {problems[0]['msg']}, not {shortened(problems[0]['input'])}{more}")


def in_one_line(error: BaseException) -> str:
    """A whole error message on one line, up to a limit; the first line of ``transformers`` errors says too little."""
    text = _printable(" ".join(str(error).split())[:300])
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text or type(error).__name__


def _printable(text: str) -> str:
    """The text with lone surrogates escaped, which no terminal can show."""
    return text.encode(errors="backslashreplace").decode()


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """The lines of a text that is broken between words only, all but the first indented."""
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def format_bytes(num_bytes: int | float) -> str:
    """``4_000_000_000 -> '3.73 GiB'``; always binary units."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def binary_unit(num_bytes: int) -> tuple[str, int]:
    """The largest unit that fits into ``num_bytes``, such as ``('GiB', 2**30)``, for tables with a single unit."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next(((unit, size) for unit, size in units if num_bytes >= size), ("B", 1))


def percent(change: float) -> str:
    """``-0.426 -> '−42.6%'``, with a proper minus sign."""
    return f"{change:+.1%}".replace("-", "−")


def format_count(count: int | float) -> str:
    """``12_300_000 -> '12.3M'``."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= 0.9995 * size:  # rounds to 1 at three digits
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def perplexity_of(loss: float) -> float:
    """The perplexity of a loss in nats per token, capped so that a very high loss does not overflow."""
    return math.exp(min(loss, 700.0))


def format_seconds(seconds: float) -> str:
    """``93_784_000 -> '1085d 11h'`` from four days on, ``3725 -> '1h02m'``, ``65 -> '1m05s'``, ``4.2 -> '4.2s'``."""
    if seconds >= 4 * 86400:
        return f"{int(seconds // 86400)}d {int(seconds % 86400 // 3600):02d}h"
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"
