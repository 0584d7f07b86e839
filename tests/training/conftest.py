"""What the tests of training share: when two runs are equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steplm.models.folder import load_state
from steplm.training.metrics import read_metrics


def _history(run_dir: Path) -> list[tuple]:
    """Everything in the log that does not depend on the clock."""
    keys = (
        "event",
        "stage",
        "step",
        "tokens_seen",
        "loss",
        "grad_norm",
        "learning_rate",
        "loss_before",
        "loss_after",
    )
    return [tuple(entry.get(key) for key in keys) for entry in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="session")
def assert_equal_runs() -> Callable[[Path, Path], None]:
    """Two run directories hold the same log, but for the clock, and the same exported weights, bit by bit."""

    def check(run_dir: Path, unbroken: Path) -> None:
        assert _history(run_dir) == _history(unbroken)
        ours, theirs = load_state(run_dir / "export"), load_state(unbroken / "export")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    return check
