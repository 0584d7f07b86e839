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
    """Scores of a run by the name of the text; none before it is finished, or where the file is damaged."""
    try:
        done = json.loads((run_dir / EVALUATIONS).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    is_whole = isinstance(done, dict) and all(isinstance(scores, dict) for scores in done.values())
    return done if is_whole else {}


def is_scored(done: Mapping[str, Any], name: str, text: TextConfig) -> bool:
    """Whether this very text, and as much of it, has been scored. Kept results name folders by variables."""
    if name not in done:
        return False
    same_words = with_environment(done[name].get("text"), name) == text.model_dump(mode="json")
    content = content_of(text)
    return same_words and done[name].get("content", content) == content


def content_of(text: TextConfig) -> list[str]:
    """What changes when a file of the text does."""
    return _described(tuple(text.data))


@cache
def _described(data: tuple[str, ...]) -> list[str]:
    return [source.describe() for source in find_sources(data)]
