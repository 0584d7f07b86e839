"""``evaluations.json`` of a run: perplexity and bits per byte of its model on each of the suite's texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steplm.compare.suite import TextConfig

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
    """Whether this very text, and as much of it, has been scored."""
    return name in done and done[name].get("text") == text.model_dump(mode="json")
