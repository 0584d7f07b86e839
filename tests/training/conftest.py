"""What the tests of training share: when two runs are equal, and how a run is stopped or killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steplm.config import RunConfig
from steplm.models.folder import load_state
from steplm.training import loop as loop_module
from steplm.training.metrics import read_metrics
from steplm.training.run import train


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


@pytest.fixture
def stop_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """``stop_before({3, 7})``: ``train`` is asked to stop before these steps, counted over all starts."""

    def install(steps: set[int]) -> None:
        original, seen = loop_module.train_step, 0

        def stopping(*arguments: Any, **keys: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen in steps:
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments, **keys)

        monkeypatch.setattr(loop_module, "train_step", stopping)

    return install


@pytest.fixture
def train_killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``train_killed_at(config, module, function, call)``: killed at this call, from 1, of a function of a module.

    The run is a forked child, which spares it the imports.
    """

    def check(config: RunConfig, module: Any, function: str, call: int = 1) -> None:
        original, calls = getattr(module, function), 0

        def killing(*arguments: Any, **keys: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keys)

        with monkeypatch.context() as patch:
            patch.setattr(module, function, killing)
            pid = os.fork()
            if pid == 0:
                try:
                    train(config)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    return check
