"""A tiny suite on the tiny run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.config import RunConfig

ENTRIES = [{"name": "vanilla", "method": "vanilla"}, {"name": "step_2", "method": "step"}]


@pytest.fixture(scope="session")
def suite_values(tiny_run: Callable[..., RunConfig]) -> Callable[..., dict[str, Any]]:
    """``suite_values(output_dir, **keys)``: what a suite's YAML would hold; keys replace the defaults."""

    def values(output_dir: Path, **keys: Any) -> dict[str, Any]:
        run = tiny_run(output_dir, "plan.total_tokens=512", "train.save_steps=2").model_dump(mode="json")
        return {
            "name": "tiny",
            "run": run,
            "output_dir": str(output_dir),
            "baseline": "vanilla",
            "entries": ENTRIES,
            **keys,
        }

    return values
