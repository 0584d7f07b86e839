"""A step whose loss or gradient is not finite is left out; too many in a row stop the run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steplm.config import RunConfig
from steplm.errors import TrainingDiverged
from steplm.training import loop as loop_module
from steplm.training import step as step_module
from steplm.training.metrics import read_metrics
from steplm.training.run import train

Configure = Callable[..., RunConfig]
BASE = ("plan.num_stages=1", "plan.total_tokens=1024")
FUSED = ("memory.fused_backward=true", "optim.max_grad_norm=0.5")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``spoil(steps, loss=…, gradient=…)``: the batches of these steps (from 1) give a loss or a gradient of NaN."""

    def spoil_steps(steps: set[int], *, loss: bool = True, gradient: bool = True) -> None:
        train_step, batch_loss = loop_module.train_step, step_module.batch_loss
        bad = False

        def stepping(model: Any, rules: Any, batch: Any, options: Any, **keys: Any) -> Any:
            nonlocal bad
            bad = stepping.positions.setdefault(batch.input_ids.sum().item(), len(stepping.positions) + 1) in steps
            result = train_step(model, rules, batch, options, **keys)
            bad = False
            return result

        stepping.positions = {}  # type: ignore[attr-defined]

        def spoilt(model: Any, *arguments: Any, **keys: Any) -> torch.Tensor:
            value = batch_loss(model, *arguments, **keys)
            if bad and gradient:
                value.register_hook(lambda grad: grad * torch.nan)
            return value * torch.nan if bad and loss else value

        monkeypatch.setattr(loop_module, "train_step", stepping)
        monkeypatch.setattr(step_module, "batch_loss", spoilt)

    return spoil_steps


def _events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl", event)


@pytest.mark.parametrize("overrides", [(), FUSED, ("optim.name=muon",)], ids=["plain", "fused", "muon"])
def test_a_step_that_is_not_finite_changes_no_weight_and_the_run_goes_on(
    tiny_run: Configure, tmp_path: Path, spoil: Callable[..., None], overrides: tuple[str, ...]
) -> None:
    spoil({3, 4, 9})
    assert train(tiny_run(tmp_path, *BASE, *overrides)).finished
    skipped = _events(tmp_path, "skipped")
    assert [(event["step"], event["skipped_in_a_row"]) for event in skipped] == [(3, 1), (4, 2), (9, 1)]
    assert all(event["loss"] is None for event in skipped)
    logged = _events(tmp_path, "train")
    assert [event["step"] for event in logged] == [step for step in range(1, 17) if step not in (3, 4, 9)]
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_a_gradient_that_is_not_finite_is_skipped_too_where_its_loss_is(
    tiny_run: Configure, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil({5}, loss=False)
    assert train(tiny_run(tmp_path, *BASE)).finished
    assert [event["step"] for event in _events(tmp_path, "skipped")] == [5]


def test_more_in_a_row_than_allowed_stop_the_run(
    tiny_run: Configure, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil({4, 5, 6})
    with pytest.raises(TrainingDiverged, match="after step 5"):
        train(tiny_run(tmp_path, *BASE, "optim.max_skipped_steps=2"))
    assert len(_events(tmp_path, "skipped")) == 2


def test_a_fused_update_by_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(
    tiny_run: Configure, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil({4}, loss=False)
    with pytest.raises(TrainingDiverged):
        train(tiny_run(tmp_path, *BASE, *FUSED, "train.save_steps=2"))
    assert not _events(tmp_path, "skipped")
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["stage1-step000002"]


def test_a_run_stopped_between_skipped_steps_ends_as_the_unbroken_one(
    tiny_run: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., None],
    assert_equal_runs: Callable[[Path, Path], None],
) -> None:
    spoil({3, 4, 9})
    overrides = (*BASE, *FUSED, "train.precision=bf16", "memory.master_weights=false", "log.logging_steps=3")
    train(tiny_run(tmp_path / "unbroken", *overrides))
    stepping, seen = loop_module.train_step, 0

    def stopping(*arguments: Any, **keys: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen in (3, 7):
            signal.raise_signal(signal.SIGTERM)
        return stepping(*arguments, **keys)

    monkeypatch.setattr(loop_module, "train_step", stopping)
    config = tiny_run(tmp_path / "stopped", *overrides)
    assert [train(config).finished for _ in range(3)] == [False, False, True]
    assert_equal_runs(tmp_path / "stopped", tmp_path / "unbroken")
