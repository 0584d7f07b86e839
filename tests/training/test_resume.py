"""Killed anywhere and started again, a run ends as if nothing had happened: the same losses, bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from steplm.checkpoint import folder as folder_module
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import RunConfig
from steplm.errors import CheckpointError, CheckpointMismatch
from steplm.planner.plan import Plan, plan
from steplm.training import enter as enter_module
from steplm.training import loop as loop_module
from steplm.training import save as save_module
from steplm.training.context import RunContext
from steplm.training.metrics import read_metrics
from steplm.training.run import train
from steplm.types import from_json

Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]
EqualRuns = Callable[[Path, Path], None]

# Logged every third step and saved every second: a resume falls between two log lines.
OVERRIDES = (
    "plan.num_stages=3", "plan.layers=[2,1,1]", "train.save_steps=2", "train.precision=bf16", "log.logging_steps=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(trained: Trained) -> Path:
    return trained(*OVERRIDES)


def test_where_every_checkpoint_is_damaged_no_start_begins_anew(tiny_run: Configure, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, *OVERRIDES)
    train(config)
    (tmp_path / "summary.json").unlink()
    for checkpoint in complete_checkpoints(tmp_path / "checkpoints"):
        (checkpoint / "model.safetensors").write_bytes(b"gone")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable: \d are damaged"):
            train(config)


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        (loop_module, "train_step", 3),
        (loop_module, "train_step", 9),
        (enter_module, "grow", 1),
        (enter_module, "grow", 2),
        (enter_module, "merge_state", 1),
        (folder_module, "save_checked_config", 2),
        (folder_module, "write_tensors", 4),
        (folder_module, "_fingerprints", 1),
        (folder_module, "write_atomically", 1),
        (folder_module, "write_atomically", 4),
        (save_module, "prune_checkpoints", 3),
    ],
)
def test_killed_at_a_chosen_instant_a_run_equals_the_unbroken_one(
    tiny_run: Configure,
    unbroken: Path,
    tmp_path: Path,
    train_killed_at: Callable[..., None],
    module: object,
    function: str,
    call: int,
    assert_equal_runs: EqualRuns,
) -> None:
    config = tiny_run(tmp_path, *OVERRIDES)
    train_killed_at(config, module, function, call)
    train(config)
    assert_equal_runs(tmp_path, unbroken)


def test_sigterm_saves_and_ends_in_order_and_the_run_resumes(
    tiny_run: Configure, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_equal_runs: EqualRuns
) -> None:
    config = tiny_run(tmp_path, *OVERRIDES)
    original, steps = loop_module.train_step, 0

    def terminating(*args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "train_step", terminating)
        result = train(config)
    assert not result.finished
    assert result.stop_signal == signal.SIGTERM
    assert (tmp_path / "checkpoints" / "stage1-step000003").is_dir()
    assert train(config).finished
    assert_equal_runs(tmp_path, unbroken)


def test_a_signal_that_comes_while_ranks_agree_waits_for_the_next_step() -> None:
    """Else this rank would stop alone, and the others wait for it."""
    run = SimpleNamespace(requested_signal=None, stop_signal=None)

    def any_rank(flag: object) -> bool:
        run.requested_signal = signal.SIGTERM
        return bool(flag)

    run.world = SimpleNamespace(any=any_rank)
    RunContext.agree_to_stop(run)  # type: ignore[arg-type]
    assert run.stop_signal is None
    RunContext.agree_to_stop(run)  # type: ignore[arg-type]
    assert run.stop_signal == signal.SIGTERM


def test_a_model_with_dropout_resumes_exactly_too(
    tiny_run: Configure, tmp_path: Path, train_killed_at: Callable[..., None], assert_equal_runs: EqualRuns
) -> None:
    overrides = (*OVERRIDES, "model.extra={attention_dropout: 0.5}", "plan.total_tokens=512")
    train(tiny_run(tmp_path / "unbroken", *overrides))
    config = tiny_run(tmp_path / "broken", *overrides)
    train_killed_at(config, enter_module, "grow")
    train(config)
    assert_equal_runs(tmp_path / "broken", tmp_path / "unbroken")


def test_resuming_continues_and_does_not_start_again(
    tiny_run: Configure,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_killed_at: Callable[..., None],
) -> None:
    config = tiny_run(tmp_path, *OVERRIDES)
    train_killed_at(config, enter_module, "grow")
    original, calls = loop_module.train_step, []

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop_module, "train_step", counting)
    train(config)
    ends = read_metrics(unbroken / "metrics.jsonl", "stage_end")
    assert len(calls) == sum(entry["step"] for entry in ends if entry["stage"] > 1) > 0


Stop = Callable[[RunConfig, int], None]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """``stop_after(config, num_steps)``: train, and stop in order by a signal in that step."""

    def stop(config: RunConfig, num_steps: int) -> None:
        original, steps = loop_module.train_step, 0

        def terminating(*args: object, **kwargs: object) -> object:
            nonlocal steps
            steps += 1
            if steps == num_steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(loop_module, "train_step", terminating)
            assert train(config).stop_signal == signal.SIGTERM

    return stop


def test_a_resumed_run_keeps_its_plan_where_today_another_would_be_made(
    tiny_run: Configure, tmp_path: Path, stop_after: Stop
) -> None:
    """How large micro-batches are changes what is least, and may be changed; the layers and phases stay."""
    base = ("model.num_hidden_layers=6", "plan.total_tokens=2048", "train.global_batch_size=16")
    begun, changed = (tiny_run(tmp_path, *base, f"train.per_device_train_batch_size={n}") for n in (1, 16))
    made = plan(begun)
    assert plan(changed).layers != made.layers
    stop_after(begun, 2)
    result = train(changed)
    assert result.finished
    assert result.plan.schedule == made.schedule
    # Its costs are those of today.
    assert result.plan.peak_bytes is not None
    assert made.peak_bytes is not None
    assert result.plan.peak_bytes > made.peak_bytes
    written = from_json(Plan, json.loads((tmp_path / "plan.json").read_text()))
    assert written == result.plan
    depths = [event["num_hidden_layers"] for event in read_metrics(tmp_path / "metrics.jsonl", "stage_start")]
    assert depths == [made.layers[0], 6]


def _edit(run_dir: Path, place: tuple[str | int, ...], value: object) -> None:
    document = json.loads((run_dir / "plan.json").read_text())
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    assert parent[place[-1]] != value
    parent[place[-1]] = value
    (run_dir / "plan.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schedule", "phases", 0, "tokens"), 128),
        (("schedule", "phases", 0, "layers", 0, "rule"), "muon"),
        (("schedule", "phases", 1, "layers", 0, "rank"), 2),
        (("schedule", "phases", 1, "layers", 0), {"kind": "frozen"}),
        (("schedule", "phases", 1, "embeddings_and_head"), {"kind": "frozen"}),
        (("schedule", "phases", 1, "entry", "operator"), "stack"),
        (("schedule", "phases", 1, "scheduled_tokens"), 4096),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_an_edited_schedule_is_refused_by_the_checkpoint(
    tiny_run: Configure, trained: Trained, tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained("plan.layers=[3,1]"), run_dir, ignore=shutil.ignore_patterns("summary.json", "stage2-end"))
    _edit(run_dir, place, value)
    log, checkpoints = (run_dir / "metrics.jsonl").read_bytes(), complete_checkpoints(run_dir / "checkpoints")
    assert checkpoints[-1].name.startswith("stage2-step")
    with pytest.raises(CheckpointMismatch, match=r"not to that of plan\.json.*Restore plan\.json"):
        train(tiny_run(run_dir, "plan.layers=[3,1]"))
    assert (run_dir / "metrics.jsonl").read_bytes() == log
    assert complete_checkpoints(run_dir / "checkpoints") == checkpoints


def test_costs_in_plan_json_are_worked_out_again_whatever_stands_there(
    tiny_run: Configure, tmp_path: Path, stop_after: Stop
) -> None:
    config = tiny_run(tmp_path)
    stop_after(config, 2)
    _edit(tmp_path, ("vanilla_model_state_bytes",), 1)
    _edit(tmp_path, ("costs", 0, "memory", "terms", 0, "num_bytes"), 1)
    assert train(config).plan == plan(config)
