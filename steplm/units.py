"""Numbers as people write them, ``"24GiB"``, ``"10B"`` tokens, and back again; values and reasons in a message."""

from __future__ import annotations

import math
import re
from typing import Any

_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "p": 10**15, "e": 10**18, "z": 10**21}
_NUMBER_AND_UNIT = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*$", re.IGNORECASE)


def _parse(value: str | int | float, units: dict[str, int], example: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number such as {example}")
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        result = value
    else:
        match = _NUMBER_AND_UNIT.match(value)
        if match is None or match.group(2).lower() not in units:
            known = ", ".join(unit for unit in units if unit)
            raise ValueError(f"cannot read {shortened(value)}: expected a number such as {example} (units: {known})")
        result = float(match.group(1).replace("_", "").replace(",", "")) * units[match.group(2).lower()]
    if not math.isfinite(result) or result != int(result):
        raise ValueError(f"{shortened(value)} is {result}, not a whole number")
    return int(result)


def parse_bytes(value: str | int | float) -> int:
    """Bytes from ``24GiB`` (2**30), ``24GB`` (10**9) or a plain number of bytes.

    Raises:
        ValueError: the text is not a number with a known unit.
    """
    return _parse(value, _BYTE_UNITS, "'24GiB'")


def parse_count(value: str | int | float) -> int:
    """A count from ``10B`` (10**9), ``2.5M``, ``1e18`` or a plain number.

    Raises:
        ValueError: the text is not a whole number with a known unit.
    """
    return _parse(value, _COUNT_UNITS, "'10B'")


def shortened(value: Any, most: int = 80) -> str:
    """``repr`` for a message: the beginning and the end of what is longer than so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most * 3 // 4]}…{text[len(text) - most // 4 :]}"


def reason(error: BaseException) -> str:
    """What an error of a parser says, in one line; of pydantic's, the first problem and where it is."""
    problems = error.errors(include_url=False) if hasattr(error, "errors") else []
    if not problems:
        first_line = str(error).strip().partition("\n")[0]
        return first_line[:300] or type(error).__name__
    where = ".".join(str(part)[:40] for part in problems[0]["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where or 'the whole'}: {problems[0]['msg']}, not {shortened(problems[0]['input'])}{more}"


def format_bytes(num_bytes: int | float) -> str:
    """``4_000_000_000 -> '3.73 GiB'``; always binary units."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def binary_unit(num_bytes: int) -> tuple[str, int]:
    """The largest unit that ``num_bytes`` has one of, and its bytes: ``('GiB', 2**30)``. For tables of one unit."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next(((unit, size) for unit, size in units if num_bytes >= size), ("B", 1))


def format_count(count: int | float) -> str:
    """``12_300_000 -> '12.3M'``."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """``3725 -> '1h02m'``, ``65 -> '1m05s'``, ``4.2 -> '4.2s'``."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"
