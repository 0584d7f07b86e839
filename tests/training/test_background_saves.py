"""Checkpoints are written while training goes on, and are whole or absent."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from steplm.checkpoint import folder as folder_module
from steplm.checkpoint import verify_checkpoint
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import RunConfig
from steplm.errors import CheckpointError
from steplm.planner.plan import plan, save_bytes
from steplm.training import loop as loop_module
from steplm.training.run import train

Configure = Callable[..., RunConfig]
BASE = ("plan.num_stages=1", "plan.total_tokens=768", "train.save_steps=4", "train.dry_run=false", "eval.eval_steps=12")


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors, train_step = folder_module.write_tensors, loop_module.train_step
    steps, two_steps_later = 0, threading.Event()

    def waiting(*arguments: Any) -> Any:
        assert two_steps_later.wait(60)
        return write_tensors(*arguments)

    def stepping(*arguments: Any, **keys: Any) -> Any:
        nonlocal steps
        steps += 1
        result = train_step(*arguments, **keys)
        if steps == 6:  # two after the save
            two_steps_later.set()
        return result

    train(tiny_run(tmp_path / "calm", *BASE, "train.save_total_limit=9"))
    monkeypatch.setattr(folder_module, "write_tensors", waiting)
    monkeypatch.setattr(loop_module, "train_step", stepping)
    train(tiny_run(tmp_path / "slow", *BASE, "train.save_total_limit=9"))
    for calm in complete_checkpoints(tmp_path / "calm" / "checkpoints"):
        slow = tmp_path / "slow" / "checkpoints" / calm.name
        verify_checkpoint(slow)
        for file in calm.rglob("*.safetensors"):
            assert (slow / file.relative_to(calm)).read_bytes() == file.read_bytes(), file


def test_a_disk_that_fills_in_the_background_stops_the_run_and_leaves_the_checkpoints_before(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors, calls = folder_module.write_tensors, 0

    def filling(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:  # the first checkpoint has two files
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensors(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_tensors", filling)
        with pytest.raises(CheckpointError, match="no space left"):
            train(tiny_run(tmp_path, *BASE))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["stage1-step000004"]
    assert train(tiny_run(tmp_path, *BASE)).finished


def test_no_tensor_file_is_read_again_for_its_hash(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint, read = folder_module.fingerprint, list[str]()

    def noting(file: Path) -> dict[str, Any]:
        if threading.current_thread().name == "checkpoint":  # the export verifies what it reads
            read.append(file.name)
        return fingerprint(file)

    monkeypatch.setattr(folder_module, "fingerprint", noting)
    train(tiny_run(tmp_path, *BASE))
    assert set(read) == {"config.json", "state.json"}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.precision=bf16",),
        ("train.precision=bf16", "memory.optimizer_states=8bit", "memory.master_weights=false"),
        ("train.precision=bf16", "memory.frozen_weights=nf4", "memory.offload_frozen=true"),
        ("train.precision=bf16", "memory.offload_optimizer=true"),
        ("train.precision=bf16", "memory.offload_optimizer=true", "memory.offload_weights=true"),
    ],
)
def test_the_planned_host_memory_of_a_save_is_that_of_the_tensors_saved(
    tiny_run: Configure, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = tiny_run(tmp_path, *overrides, "eval.eval_steps=99", "train.save_steps=99")
    train(config)
    largest = 0
    for checkpoint in complete_checkpoints(tmp_path / "checkpoints"):
        files = [load_file(file) for file in checkpoint.rglob("*.safetensors")]
        largest = max(largest, sum(tensor.nbytes for tensors in files for tensor in tensors.values()))
    assert save_bytes(plan(config), config) == largest
