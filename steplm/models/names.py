"""Short model names for tables and files, derived from model paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

EXPORT = "export"  # folder of a run's exported model; the parent folder gives the name


def short_name(model: str) -> str:
    """The last part of a model's folder or hub name; for an export, the name of its run."""
    return short_names([model])[0]


def short_names(models: Sequence[str]) -> list[str]:
    """The shortest path endings that tell the models apart, after dropping any common ending.

    ``runs/step/lr1/export`` and ``runs/vanilla/lr1/export`` become ``step`` and ``vanilla``. Equal paths get equal
    names.
    """
    paths = [_telling_parts(model) for model in models]
    while len(paths) > 1 and all(len(parts) > 1 for parts in paths) and len({parts[-1] for parts in paths}) == 1:
        paths = [parts[:-1] for parts in paths]
    longest = max(map(len, paths), default=0)
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in paths]


def _telling_parts(model: str) -> list[str]:
    parts = [part for part in Path(model).parts if part not in ("/", "~", "..", ".")]
    return (parts[:-1] if len(parts) > 1 and parts[-1] == EXPORT else parts) or ["model"]
