"""One checkpoint, one folder.

    stage2-step001200/
      config.json  model*.safetensors     loads in transformers (without the adapters' update)
      adapters.safetensors                where the stage has adapters
      optimizer/state.safetensors         keyed by parameter name
      state.json                          progress, plan hash, provenance, trained names, versions
      COMPLETE                            size and sha256 of every file, written last

A folder is written under a temporary name, renamed, and only then marked. Readers ignore a folder
without the marker, so a process killed at any instant leaves the previous checkpoint in force.
Nothing is pickled: safetensors and JSON only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

import steplm
from steplm.errors import CheckpointError
from steplm.files import sync, write_atomically
from steplm.models.folder import load_hf_config, load_state, load_tensors, save_folder
from steplm.types import AdapterSpec, LayerProvenance, TrainState, from_json, to_json

MARKER = "COMPLETE"
ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer/state.safetensors"
TEMPORARY = ".writing-"
_NAME = re.compile(r"stage(\d+)-(?:step(\d+)|end)$")


@dataclass(frozen=True)
class CheckpointState:
    """What ``state.json`` holds."""

    progress: TrainState
    plan_hash: str  # of the stages up to this one
    data_fingerprint: str
    provenance: tuple[LayerProvenance, ...]
    trained_names: tuple[str, ...]
    adapters: AdapterSpec | None
    optimizer_steps: dict[str, int]
    metrics_bytes: int  # length of metrics.jsonl at this instant: what comes after is replayed
    elapsed_seconds: float
    unlogged_losses: tuple[float, ...] = ()  # of the steps since the last log line
    probe_loss: float | None = None  # on the probe batches, at a stage's end, before the merge
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in memory: plain named tensors on the CPU."""

    path: Path
    config: PretrainedConfig
    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: CheckpointState


def checkpoint_name(progress: TrainState) -> str:
    """``stage2-step001200``, or ``stage2-end``."""
    return f"stage{progress.stage_index}-" + ("end" if progress.stage_done else f"step{progress.step:06d}")


def save_checkpoint(
    root: Path,
    *,
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    adapters: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: CheckpointState,
) -> Path:
    """Write ``root/<name>`` atomically and return its path.

    Raises:
        CheckpointError: it cannot be written (a full disk); checkpoints written before stay whole.
    """
    final = root / checkpoint_name(state.progress)
    temporary = root / f"{TEMPORARY}{final.name}"
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        save_folder(temporary, config, weights)
        if adapters:
            save_file(adapters, temporary / ADAPTERS)
        (temporary / OPTIMIZER).parent.mkdir()
        save_file(optimizer, temporary / OPTIMIZER)
        document = to_json(state) | {"versions": _versions()}
        (temporary / "state.json").write_text(json.dumps(document, indent=1))
        marker = json.dumps(_fingerprints(temporary), indent=1)
        _discard(final)
        os.replace(temporary, final)
        sync(root)  # before older checkpoints are pruned
        write_atomically(final / MARKER, marker)
    # safetensors and huggingface_hub wrap a failed write in errors of their own.
    except Exception as error:
        _remove(temporary)
        if _is_disk_full(error):
            free = shutil.disk_usage(root).free
            raise CheckpointError(
                f"no space left while writing {final} ({free:,} bytes are free). The checkpoints before it are whole: "
                "free some space, or lower train.save_total_limit, and run the same command again to resume.",
                path=str(final),
                free_bytes=free,
            ) from None
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {final}: {error.strerror or error}", path=str(final)) from None
        raise
    return final


def load_checkpoint(path: Path, *, verify: bool = True, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint; with ``verify``, the size and sha256 of every file that is read first.

    Without ``with_optimizer`` the optimizer's tensors, most of the bytes, stay unread.

    Raises:
        CheckpointError: incomplete, damaged, or of another format.
    """
    if verify:
        verify_checkpoint(path, with_optimizer=with_optimizer)
    state = load_checkpoint_state(path)
    return Checkpoint(
        path=path,
        config=load_hf_config(path),
        weights=load_state(path),
        adapters=load_tensors(path / ADAPTERS) if (path / ADAPTERS).is_file() else {},
        optimizer=load_tensors(path / OPTIMIZER) if with_optimizer else {},
        state=state,
    )


def load_checkpoint_state(path: Path) -> CheckpointState:
    """``state.json`` alone."""
    try:
        return from_json(CheckpointState, json.loads((path / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be used: {error}", path=str(path)) from None


def verify_checkpoint(path: Path, *, with_optimizer: bool = True) -> None:
    """Compare every file (or all but the optimizer's) with the sizes and hashes in the marker.

    Raises:
        CheckpointError: the marker is missing, or a file is missing, truncated or altered.
    """
    try:
        expected: dict[str, dict[str, Any]] = json.loads((path / MARKER).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MARKER} file", path=str(path)) from None
    except ValueError:
        raise CheckpointError(f"{path / MARKER} is damaged", path=str(path)) from None
    for name, wanted in expected.items():
        if name == OPTIMIZER and not with_optimizer:
            continue
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing from the checkpoint", path=str(file))
        if file.stat().st_size != wanted["bytes"]:
            raise CheckpointError(
                f"{file} is damaged: {file.stat().st_size:,} bytes where {wanted['bytes']:,} were written",
                path=str(file),
            )
        if _sha256(file) != wanted["sha256"]:
            raise CheckpointError(f"{file} is damaged: its sha256 is not the one that was written", path=str(file))


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders with a marker, oldest progress first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.match(path.name) and (path / MARKER).is_file()), key=_age)


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint with the most progress, or ``None``."""
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def mark_damaged(path: Path) -> Path:
    """Rename a checkpoint to ``<name>.damaged`` and return that path: no longer read, counted or pruned."""
    damaged = path.with_name(f"{path.name}.damaged")
    _remove(damaged)
    os.replace(path, damaged)
    sync(path.parent)
    return damaged


def prune_checkpoints(root: Path, keep_last: int) -> None:
    """Delete all but the last ``keep_last`` checkpoints within stages; every stage's end is kept."""
    within = [path for path in complete_checkpoints(root) if not path.name.endswith("-end")]
    for path in within[:-keep_last]:
        _discard(path)
    if root.is_dir():
        for path in root.iterdir():
            unmarked = _NAME.match(path.name) and not (path / MARKER).exists()
            if path.name.startswith(TEMPORARY) or unmarked:
                _remove(path)


def _age(path: Path) -> tuple[int, float]:
    match = _NAME.match(path.name)
    assert match is not None
    return int(match.group(1)), float(match.group(2) or "inf")


def _fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    for path in (folder, *folder.rglob("*")):
        sync(path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _discard(path: Path) -> None:
    # Unmarked first: a kill in the middle of a deletion must not leave a marked, gutted folder.
    (path / MARKER).unlink(missing_ok=True)
    _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _is_disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _versions() -> dict[str, str]:
    return {
        "steplm": steplm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
