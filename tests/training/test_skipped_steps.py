"""A step whose loss or gradient is not finite is left out; too many in a row stop the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steplm.config import RunConfig
from steplm.errors import ConfigError, TrainingDiverged
from steplm.models.folder import load_state
from steplm.training import loop as loop_module
from steplm.training import spikes as spikes_module
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
    stop_before: Callable[[set[int]], None],
    spoil: Callable[..., None],
    assert_equal_runs: Callable[[Path, Path], None],
) -> None:
    spoil({3, 4, 9})
    overrides = (*BASE, *FUSED, "train.precision=bf16", "memory.master_weights=false", "log.logging_steps=3")
    train(tiny_run(tmp_path / "unbroken", *overrides))
    stop_before({3, 7})
    config = tiny_run(tmp_path / "stopped", *overrides)
    assert [train(config).finished for _ in range(3)] == [False, False, True]
    assert_equal_runs(tmp_path / "stopped", tmp_path / "unbroken")


SPIKES = (*BASE, "optim.skip_sigma_factor=50", "optim.max_skipped_steps=2", "train.dry_run=false")


@pytest.fixture
def spike(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """``spike({3: 1e3})``: the batch of step 3 (from 1) gives gradients a thousand times as large."""
    monkeypatch.setattr(spikes_module, "MIN_NORMS", 4)

    def spike_steps(factors: dict[int, float]) -> None:
        batch_loss, positions = step_module.batch_loss, dict[int, int]()

        def scaled(model: Any, input_ids: torch.Tensor, *arguments: Any, **keys: Any) -> torch.Tensor:
            value = batch_loss(model, input_ids, *arguments, **keys)
            if len(input_ids) == 4 and torch.is_grad_enabled():  # of a step, not of a trial or an evaluation
                step = positions.setdefault(input_ids.sum().item(), len(positions) + 1)
                value.register_hook(lambda grad: grad * factors.get(step, 1))
            return value

        monkeypatch.setattr(step_module, "batch_loss", scaled)

    return spike_steps


def test_spikes_are_skipped_and_the_one_after_as_many_as_allowed_is_taken(
    tiny_run: Configure, tmp_path: Path, spike: Callable[[dict[int, float]], None]
) -> None:
    # Too few norms before the third step; the tenth is taken; after it the usual spread is that of spikes.
    spike({3: 10, 8: 1e3, 9: 1e6, 10: 1e9, 14: 1e3})
    assert train(tiny_run(tmp_path, *SPIKES)).finished
    skipped = _events(tmp_path, "skipped")
    assert [(event["step"], event["skipped_in_a_row"]) for event in skipped] == [(8, 1), (9, 2)]
    assert all(event["grad_norm"] > 100 > event["loss"] for event in skipped)
    logged = _events(tmp_path, "train")
    assert [event["step"] for event in logged] == [step for step in range(1, 17) if step not in (8, 9)]


def test_a_skipped_spike_changes_no_weight(
    tiny_run: Configure, tmp_path: Path, spike: Callable[[dict[int, float]], None]
) -> None:
    spike({16: 1e3})
    config = tiny_run(tmp_path, *SPIKES, "train.save_steps=15")
    train(config)
    assert [event["step"] for event in _events(tmp_path, "skipped")] == [16]
    before, after = (load_state(tmp_path / "checkpoints" / name) for name in ("stage1-step000015", "stage1-end"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_run_stopped_between_spikes_ends_as_the_unbroken_one(
    tiny_run: Configure,
    tmp_path: Path,
    stop_before: Callable[[set[int]], None],
    spike: Callable[[dict[int, float]], None],
    assert_equal_runs: Callable[[Path, Path], None],
) -> None:
    spike({6: 1e3, 8: 1e6})
    train(tiny_run(tmp_path / "unbroken", *SPIKES))
    assert len(_events(tmp_path / "unbroken", "skipped")) == 2
    stop_before({3, 7})
    config = tiny_run(tmp_path / "stopped", *SPIKES)
    assert [train(config).finished for _ in range(3)] == [False, False, True]
    assert_equal_runs(tmp_path / "stopped", tmp_path / "unbroken")


def test_spikes_cannot_be_skipped_where_updates_come_before_the_norm(tiny_run: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.skip_sigma_factor=50 compares the norm"):
        train(tiny_run(tmp_path, *SPIKES, "memory.fused_backward=true"))


def test_the_highest_norm_is_so_many_deviations_above_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = (1.0, 3.0) * (spikes_module.WINDOW // 2)
    assert spikes_module.highest_norm(norms, 6) == 2 + 6 * 1
    assert spikes_module.highest_norm(norms, None) == math.inf
    assert spikes_module.highest_norm(norms[: spikes_module.MIN_NORMS - 1], 6) == math.inf
    assert spikes_module.with_norm(norms, 9.0) == (*norms[1:], 9.0)
    assert spikes_module.with_norm(norms, math.nan) == norms
