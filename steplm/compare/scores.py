"""``evaluations.json`` of a run: perplexity and bits per byte of its model on each of the suite's texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from steplm.compare.suite import TextConfig
from steplm.data.sources import find_sources
from steplm.yaml_files import with_environment

EVALUATIONS = "evaluations.json"


def evaluations(run_dir: Path) -> dict[str, Any]:
    """A run's scores by text name; empty before it is finished, or if the file is damaged."""
    try:
        done = json.loads((run_dir / EVALUATIONS).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    is_whole = isinstance(done, dict) and all(isinstance(scores, dict) for scores in done.values())
    return done if is_whole else {}


def is_scored(done: Mapping[str, Any], name: str, text: TextConfig) -> bool:
    """Whether exactly this text, to the same length, has been scored.

    Saved results may refer to folders by environment variables.
    """
    if name not in done:
        return False
    same_words = with_environment(done[name].get("text"), name) == text.model_dump(mode="json")
    content = content_of(text)
    return same_words and done[name].get("content", content) == content


def content_of(text: TextConfig) -> list[str]:
    """A description of the text's files that changes when a file does."""
    return _described(tuple(text.data))


@cache
def _described(data: tuple[str, ...]) -> list[str]:
    return [source.describe() for source in find_sources(data)]
