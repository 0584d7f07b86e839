from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steplm.checkpoint import (
    Checkpoint,
    CheckpointState,
    checkpoint_name,
    latest_checkpoint,
    load_checkpoint,
    mark_damaged,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from steplm.checkpoint import folder as folder_module
from steplm.checkpoint.folder import MARKER, complete_checkpoints
from steplm.errors import CheckpointError
from steplm.models.build import build_model, hf_config, initial_state
from steplm.schedule import Adapter, Entry, Frozen, Phase, Trained
from steplm.types import LayerMap, LayerOrigin, LayerProvenance, TrainState

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}


PHASE = Phase(
    index=2,
    stage=2,
    entry=Entry("grow", LayerMap((LayerOrigin((0,)), LayerOrigin((0,), is_new=True))), "interpolation_mean"),
    layers=(Adapter(2, 2.0, ("q_proj",)), Trained("muon")),
    embeddings_and_head=Frozen(),
    tokens=640,
    scheduled_tokens=6400,
    schedule_start_tokens=64,
)


def _state(step: int, *, stage: int = 1, done: bool = False) -> CheckpointState:
    return CheckpointState(
        progress=TrainState(stage, stage, step, step, 64 * step, phase_done=done, stage_done=done),
        schedule_hash="abc",
        phase=PHASE,
        data_fingerprint="def",
        provenance=(LayerProvenance(1, (), None), LayerProvenance(2, (0, 1), "interpolation_mean")),
        trained_names=("lm_head.weight",),
        optimizer_steps={"lm_head.weight": step},
        metrics_bytes=123,
        elapsed_seconds=4.5,
        probe_loss=3.25,
    )


def _save(root: Path, step: int, **keys: object) -> Path:
    config = hf_config(CONFIG)
    return save_checkpoint(
        root,
        config=config,
        weights=initial_state(config, seed=step, dtype=torch.bfloat16),
        adapters={"model.layers.0.self_attn.q_proj.lora_A": torch.randn(2, 16).bfloat16()},
        optimizer={"lm_head.weight.master": torch.randn(40, 16)},
        state=_state(step, **keys),  # type: ignore[arg-type]
    )


def test_a_checkpoint_reads_back_to_the_bit(tmp_path: Path) -> None:
    path = _save(tmp_path, 3)
    read: Checkpoint = load_checkpoint(path)
    weights = initial_state(hf_config(CONFIG), seed=3, dtype=torch.bfloat16)
    assert read.weights.keys() == weights.keys()
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in weights.items())
    assert read.optimizer["lm_head.weight.master"].dtype == torch.float32
    assert read.state.versions["torch"] == torch.__version__
    assert read.state.progress == _state(3).progress
    assert read.state.phase == PHASE
    assert read.state.provenance == _state(3).provenance


def test_a_checkpoint_loads_in_transformers_as_it_stands(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    ours = build_model(hf_config(CONFIG), load_checkpoint(path).weights).eval()
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    assert theirs.dtype == torch.bfloat16


def test_the_latest_is_the_one_with_the_most_progress(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    for step, stage, done in ((5, 1, True), (2, 1, False), (1, 2, False), (4, 1, False)):
        _save(tmp_path, step, stage=stage, done=done)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "stage1-step000002",
        "stage1-step000004",
        "stage1-end",
        "stage2-step000001",
    ]
    assert checkpoint_name(TrainState(2, 5, 1, 0, 0)) == "stage2-step000001"


def test_stage_ends_are_kept_and_others_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    _save(tmp_path, 4, done=True)
    (tmp_path / ".writing-stage1-step000009").mkdir()
    (tmp_path / "stage1-step000008").mkdir()  # renamed, killed before it was marked
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes",
        "stage1-end",
        "stage1-step000002",
        "stage1-step000003",
    ]


def test_a_folder_without_the_marker_is_ignored(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    newer = _save(tmp_path, 2)
    (newer / MARKER).unlink()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "stage1-step000001"
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        verify_checkpoint(newer)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/state.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    file = _save(tmp_path, 1) / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes(content[:middle] if damage == "truncate" else flipped)
    with pytest.raises(CheckpointError, match=Path(name).name):
        load_checkpoint(tmp_path / "stage1-step000001")


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _save(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module, "write_tensors", full)
    with pytest.raises(CheckpointError, match="no space left") as caught:
        _save(tmp_path, 2)
    assert caught.value.free_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    verify_checkpoint(before)


def test_a_marker_is_readable_json_with_sizes(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    marker = json.loads((path / MARKER).read_text())
    assert marker["config.json"]["bytes"] == (path / "config.json").stat().st_size
    assert set(marker) == {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MARKER}


def test_a_damaged_checkpoint_neither_counts_nor_pushes_a_good_one_out(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    damaged = mark_damaged(_save(tmp_path, 5))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["stage1-step000001"]
    new = _save(tmp_path, 2)
    prune_checkpoints(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == new
    assert (damaged / MARKER).is_file(), "kept, for whoever wants to look into it"
    assert mark_damaged(_save(tmp_path, 5)) == damaged, "the same step damaged again"


def test_the_optimizer_can_be_left_unread(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "optimizer" / "state.safetensors").unlink()
    read = load_checkpoint(path, with_optimizer=False)
    assert read.optimizer == {}
    assert "lm_head.weight" in read.weights
    (path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(path, with_optimizer=False)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux to see which file is synced")
def test_everything_is_on_the_disk_before_it_is_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders before the rename, the rename before the marker, the marker's name at the end."""
    events: list[tuple[str, Path]] = []
    replace, fsync = os.replace, os.fsync

    def spy_replace(source: Path, target: Path) -> None:
        replace(source, target)
        events.append(("replace", Path(target)))

    def spy_fsync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve()))
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    path = _save(tmp_path, 1)
    renamed, marked = events.index(("replace", path)), events.index(("replace", path / MARKER))
    written = tmp_path / f".writing-{path.name}"
    synced = {target for _, target in events[:renamed]}
    assert {written, written / "optimizer", written / "state.json", written / "model.safetensors"} <= synced
    assert ("sync", tmp_path) in events[renamed:marked]
    assert events[-1] == ("sync", path)
    assert marked == len(events) - 2


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "stray").touch()
    assert _save(tmp_path, 1) == path
    verify_checkpoint(path)
    assert not (path / "stray").exists()
