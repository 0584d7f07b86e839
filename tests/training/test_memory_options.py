"""Every memory option, alone and with the others: planned bytes to the byte, exact resume, the same numbers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steplm.config import RunConfig
from steplm.errors import CheckpointMismatch
from steplm.models.folder import load_state
from steplm.planner.plan import plan
from steplm.training import loop as loop_module
from steplm.training.display import Display
from steplm.training.metrics import read_metrics
from steplm.training.run import RunResult, train

Configure = Callable[..., RunConfig]

FUSED = ("memory.fused_backward=true", "optim.max_grad_norm=null")
OPTIONS: dict[str, tuple[str, ...]] = {
    "8bit": ("memory.optimizer_states=8bit",),
    "no_master": ("memory.master_weights=false",),
    "fused": FUSED,
    "int8": ("memory.frozen_weights=int8",),
    "nf4": ("memory.frozen_weights=nf4",),
    "offload_frozen": ("memory.offload_frozen=true",),
    "offload_activations": ("memory.offload_activations=true",),
    "adapted_embeddings": ("plan.train_embeddings=adapters",),
    "frozen_embeddings": ("plan.train_embeddings=first_stage",),
    "checkpoint_frozen": ("train.gradient_checkpointing=frozen",),
    "checkpoint_new": ("train.gradient_checkpointing=new",),
}
OPTIONS["all"] = (
    "memory.optimizer_states=8bit", "memory.master_weights=false", *FUSED, "memory.frozen_weights=nf4",
    "memory.offload_frozen=true", "memory.offload_activations=true", "plan.train_embeddings=adapters",
    "train.gradient_checkpointing=true",
)  # fmt: skip
# How a step is computed, not what.
SAME_NUMBERS = ("offload_frozen", "offload_activations", "checkpoint_frozen", "checkpoint_new")
BASE = ("train.precision=bf16", "train.gradient_accumulation_steps=1", "plan.num_stages=3")


def run(config: RunConfig) -> RunResult:
    result = train(config)
    assert result.finished
    return result


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(run_dir / "metrics.jsonl", "train")]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in SAME_NUMBERS])
def test_a_stopped_run_ends_as_the_unbroken_one(
    name: str, tiny_run: Configure, tmp_path: Path, stop_before: Callable[[set[int]], None]
) -> None:
    # Planned bytes are compared with measured ones, to the byte, at every entrance of a stage on the way.
    options = (*BASE, *OPTIONS[name])
    unbroken = run(tiny_run(tmp_path / "unbroken", *options))
    config = tiny_run(tmp_path / "stopped", *options)
    stop_before({4, 11})  # within a stage, and in another
    assert [train(config).finished for _ in range(3)] == [False, False, True]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    assert unbroken.export_dir is not None
    before, after = load_state(unbroken.export_dir), load_state(tmp_path / "stopped" / "export")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", SAME_NUMBERS)
def test_an_option_that_changes_only_where_bytes_are_changes_no_loss(
    name: str, tiny_run: Configure, trained: Callable[..., Path], tmp_path: Path
) -> None:
    layers = "plan.layers=[2,1,1]"  # the option changes which division has the least peak
    run(tiny_run(tmp_path, *BASE, *OPTIONS[name], layers))
    assert losses(tmp_path) == losses(trained(*BASE, layers))


def test_what_packing_costs_is_logged(tiny_run: Configure, tmp_path: Path) -> None:
    run(tiny_run(tmp_path, *BASE, *OPTIONS["nf4"]))
    events = read_metrics(tmp_path / "metrics.jsonl", "pack")
    assert [event["stage"] for event in events] == [2, 3]
    for event in events:
        assert 0.05 < event["relative_rms_error"] < 0.15
        assert event["loss_before"] != event["loss_after"]
        assert abs(event["loss_before"] - event["loss_after"]) < 0.5


def test_a_run_of_another_format_is_not_resumed(tiny_run: Configure, tmp_path: Path) -> None:
    run(tiny_run(tmp_path, *BASE))
    with pytest.raises(CheckpointMismatch, match=r"memory\.optimizer_states: fp32 -> 8bit"):
        train(tiny_run(tmp_path, *BASE, *OPTIONS["8bit"]))


def test_the_measured_peak_of_the_dry_run_is_the_planned_one(tiny_run: Configure, tmp_path: Path) -> None:
    options = (*BASE, "train.per_device_train_batch_size=8", "train.sequence_length=64", "plan.total_tokens=4096")
    run(tiny_run(tmp_path, *options))
    starts = read_metrics(tmp_path / "metrics.jsonl", "stage_start")
    assert [start["stage"] for start in starts] == [1, 2, 3]
    for start in starts:
        # Beside what the plan knows of, a few numbers of the loader and of the loss.
        assert start["measured_dry_run_bytes"] == pytest.approx(start["planned_dry_run_bytes"], rel=0.005)


def test_a_begun_run_keeps_its_layers_at_another_micro_batch(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")
    small = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=8")
    base = ("plan.total_tokens=1024", "model.num_hidden_layers=8")
    first, second = tiny_run(tmp_path, *base, *large), tiny_run(tmp_path, *base, *small)
    assert plan(first).layers != plan(second).layers, "what this test needs"
    original = loop_module.train_step

    def stopping(*args: object, **keys: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(loop_module, "train_step", stopping)
    assert not train(first).finished
    monkeypatch.undo()
    assert run(second).plan.layers == plan(first).layers


def test_the_display_names_the_error_of_packing(
    capsys: pytest.CaptureFixture[str], tiny_run: Configure, tmp_path: Path
) -> None:
    from rich.console import Console

    train(tiny_run(tmp_path, *BASE, *OPTIONS["int8"]), display=Display(Console(soft_wrap=True)))
    assert "packing  frozen weights to int8, relative error 0." in capsys.readouterr().out
