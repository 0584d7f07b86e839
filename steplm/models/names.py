"""What a model is called in tables and files, from its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

EXPORT = "export"  # where a run leaves its model: the folder above says more


def short_name(model: str) -> str:
    """Of the run that an export is of, of the folder, or on the hub, without what lies above."""
    return short_names([model])[0]


def short_names(models: Sequence[str]) -> list[str]:
    """The end of each path, as much of it as tells the models apart, without what ends all of them.

    ``runs/step/lr1/export`` and ``runs/vanilla/lr1/export`` are ``step`` and ``vanilla``. Equal paths have equal names.
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
