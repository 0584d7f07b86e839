"""Checkpoints, with one folder each.

    stage2-step001200/
      config.json  model*.safetensors     loads in transformers (without the adapters' update)
      adapters.safetensors                if the stage has adapters
      optimizer/state.safetensors         keyed by parameter name
      state.json                          progress, schedule hash, phase, provenance, trained names, versions
      COMPLETE                            size and sha256 of every file, written last

A checkpoint written by several ranks has ``shards/`` instead of the three kinds of tensor files: each rank's rows of
``weights/NAME``, ``adapters/NAME`` and ``optimizer/NAME``, in safetensors; see ``shards``.

A folder is written under a temporary name, renamed, and only then marked ``COMPLETE``. Readers ignore folders
without the marker, so the previous checkpoint stays valid if the process is killed at any point.
Nothing is pickled: safetensors and JSON only.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PretrainedConfig

from steplm.checkpoint.hashed import write_tensors
from steplm.checkpoint.shards import Background, BackgroundWriter, Fingerprints, TensorFiles, fingerprint
from steplm.errors import CheckpointError
from steplm.files import sync, write_atomically
from steplm.models.folder import (
    MAX_SHARD_SIZE,
    load_hf_config,
    load_state,
    load_tensors,
    save_checked_config,
    save_hf_config,
)
from steplm.rows import WHOLE, Rows
from steplm.schedule import Phase
from steplm.types import LayerProvenance, SourceLoss, TrainState, from_json, to_json
from steplm.units import reason, shortened
from steplm.version import __version__

MARKER = "COMPLETE"
ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer/state.safetensors"
SHARDS = "shards"
TEMPORARY = ".writing-"
_NAME = re.compile(r"stage(\d+)-(?:step(\d+)|end)$")


@dataclass(frozen=True)
class CheckpointState:
    """The contents of ``state.json``."""

    progress: TrainState
    schedule_hash: str  # of the phases up to this one
    phase: Phase  # current phase when the checkpoint was written
    data_fingerprint: str
    provenance: tuple[LayerProvenance, ...]
    trained_names: tuple[str, ...]
    optimizer_steps: dict[str, int]
    metrics_bytes: int  # length of metrics.jsonl at this point; a resume truncates the log to it
    elapsed_seconds: float
    unlogged_losses: tuple[float, ...] = ()  # of the steps since the last log line
    unlogged_sources: tuple[SourceLoss, ...] = ()  # per source of a mixture, summed over those steps
    probe_loss: float | None = None  # on the probe windows, at the end of a phase, before the merge
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, as named CPU tensors; each rank holds its rows, but whole adapters."""

    path: Path | None  # None if it was never written to disk
    config: PretrainedConfig
    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: CheckpointState


def checkpoint_name(progress: TrainState) -> str:
    """Folder name of a checkpoint, such as ``stage2-step001200`` or ``stage2-end``."""
    return f"stage{progress.stage_index}-" + ("end" if progress.stage_done else f"step{progress.step:06d}")


def save_checkpoint(
    root: Path,
    *,
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    adapters: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: CheckpointState,
    background: Background | None = None,
    then: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``root/<name>`` atomically and return its path.

    Args:
        weights, adapters, optimizer: contiguous CPU tensors; with ``background``, do not modify them afterwards.
        background: write the tensors in this thread and return immediately; ``background.wait()`` raises any error.
        then: called when the checkpoint is complete.

    Raises:
        CheckpointError: the checkpoint cannot be written (such as on a full disk); earlier checkpoints stay intact.
    """
    final = root / checkpoint_name(state.progress)
    temporary = _temporary(final)

    def write() -> None:
        with _whole_or_absent(temporary, final):
            known = _write_weights(temporary, weights)
            if adapters:
                known[ADAPTERS] = write_tensors(adapters, temporary / ADAPTERS)
            (temporary / OPTIMIZER).parent.mkdir()
            known[OPTIMIZER] = write_tensors(optimizer, temporary / OPTIMIZER)
            _complete(temporary, final, state, known)
        then()

    _remove(temporary)
    with _whole_or_absent(temporary, final):
        # Not in the background: the check builds a model, which changes PyTorch's settings for all threads.
        save_checked_config(temporary, config, weights)
    if background is None:
        write()
    else:
        background.begin(write)
    return final


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> Fingerprints:
    """Write ``model*.safetensors`` as transformers expects them, sharded above 5 GB."""
    split = split_torch_state_dict_into_shards(weights, max_shard_size=MAX_SHARD_SIZE)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return {
        file: write_tensors({name: weights[name] for name in names}, folder / file)
        for file, names in split.filename_to_tensors.items()
    }


def copy_checkpoint(source: Path, root: Path, state: CheckpointState) -> Path:
    """Copy a verified checkpoint to another run, with a new ``state``; files are hard-linked if possible.

    Returns:
        ``root/<name>``.

    Raises:
        CheckpointError: the copy cannot be written.
    """
    known = _read_marker(source)
    del known["state.json"]
    final = root / checkpoint_name(state.progress)
    temporary = _temporary(final)
    _remove(temporary)
    with _whole_or_absent(temporary, final):
        for name in known:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / name, temporary / name)
        _complete(temporary, final, state, known)
    return final


def _link_or_copy(source: Path, target: Path) -> None:
    # Linking is safe because checkpoint files are never modified after their folder is complete.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def save_shards(
    root: Path,
    writer: BackgroundWriter,
    *,
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: CheckpointState,
    then: Callable[[], None],
) -> Path:
    """Like ``save_checkpoint``, but written by all ranks together, always in the background.

    Returns immediately; ``writer.wait()`` waits for the end. An error on any rank is then raised on every rank.

    Args:
        weights, adapters, optimizer: sharded tensors as ``DTensor``; any other is the same on every rank.
        then: called on rank 0 when the checkpoint is complete.
    """
    final = root / checkpoint_name(state.progress)
    temporary = _temporary(final)

    def prepare() -> None:
        _remove(temporary)
        (temporary / SHARDS).mkdir(parents=True)

    def finish(shards: Fingerprints) -> None:
        save_hf_config(temporary, config, next(iter(weights.values())).dtype)
        _complete(temporary, final, state, {f"{SHARDS}/{name}": value for name, value in shards.items()})
        then()

    tensors = {
        f"{kind}/{name}": tensor
        for kind, named in (("weights", weights), ("adapters", adapters), ("optimizer", optimizer))
        for name, tensor in named.items()
    }
    writer.start(
        temporary / SHARDS,
        tensors,
        prepare=prepare,
        finish=finish,
        explain=lambda error: explained(error, final),
        discard=lambda: _remove(temporary),
    )
    return final


@contextmanager
def _whole_or_absent(temporary: Path, final: Path) -> Iterator[None]:
    """On failure, remove the temporary folder and raise an error that says what to do."""
    try:
        yield
    except Exception as error:  # not only OSError: huggingface_hub wraps failed writes in its own errors
        _remove(temporary)
        raise explained(error, final) from None


def _temporary(final: Path) -> Path:
    return final.with_name(f"{TEMPORARY}{final.name}")


def _complete(temporary: Path, final: Path, state: CheckpointState, known: Fingerprints) -> None:
    """Write the state, hash the files, rename the folder, and write the marker last.

    Files whose hash is ``known`` are not read again.
    """
    document = to_json(state) | {"versions": _versions()}
    (temporary / "state.json").write_text(json.dumps(document, indent=1))
    marker = json.dumps(_fingerprints(temporary, known), indent=1)
    _discard(final)
    os.replace(temporary, final)
    sync(final.parent)  # before older checkpoints are pruned
    write_atomically(final / MARKER, marker)


def explained(error: Exception, path: Path) -> Exception:
    """Turn a failed write into an error that tells the user what to do; return any other error unchanged."""
    if is_disk_full(error):
        free = shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
        return CheckpointError(
            f"no space left while writing {path} ({free:,} bytes are free). The checkpoints before it are whole: "
            "free some space, or lower train.save_total_limit, and run the same command again to resume.",
            path=str(path),
            free_bytes=free,
        )
    if isinstance(error, OSError):
        return CheckpointError(f"cannot write {path}: {error.strerror or error}", path=str(path))
    return error


def load_checkpoint(path: Path, *, rows: Rows = WHOLE, verify: bool = True, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint; with ``verify``, check the size and sha256 of its files first.

    Args:
        rows: rows of each weight and optimizer state to read, however many ranks wrote them. Adapters are read whole.
        with_optimizer: whether to read the optimizer's tensors, which are most of the bytes.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or in another format.
    """
    if verify:
        verify_checkpoint(path, with_optimizer=with_optimizer)
    state = load_checkpoint_state(path)
    optimizer: dict[str, Tensor] = {}
    if (path / SHARDS).is_dir():
        files = TensorFiles(path / SHARDS)
        weights, adapters = files.below("weights/", rows), files.below("adapters/")
        optimizer = files.below("optimizer/", rows) if with_optimizer else {}
    elif rows.is_whole:
        weights = load_state(path)
        adapters = load_tensors(path / ADAPTERS) if (path / ADAPTERS).is_file() else {}
        optimizer = load_tensors(path / OPTIMIZER) if with_optimizer else {}
    else:
        files = TensorFiles(path)
        in_adapters = [name for name in files.shapes if files.file_of(name) == ADAPTERS]
        weights = files.read_all(files.shapes.keys() - set(in_adapters), rows)
        adapters = files.read_all(in_adapters)
        if with_optimizer:
            states = TensorFiles((path / OPTIMIZER).parent)
            optimizer = states.read_all(states.shapes, rows)
    return Checkpoint(path, load_hf_config(path), weights, adapters, optimizer, state)


def load_checkpoint_state(path: Path) -> CheckpointState:
    """Read only ``state.json``."""
    try:
        return from_json(CheckpointState, json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be used: {reason(error)}", path=str(path)) from None


def verify_checkpoint(path: Path, *, with_optimizer: bool = True) -> None:
    """Compare every file (or all but the optimizer's) with the sizes and hashes in the marker.

    Raises:
        CheckpointError: the marker is missing, or a file is missing, truncated or altered.
    """
    expected = _read_marker(path)
    # Files of these types would be read without a hash to check them; unknown files of other types are harmless.
    for file in sorted((*path.rglob("*.safetensors"), *path.rglob("*.json"))):
        if str(file.relative_to(path)) not in expected:
            raise CheckpointError(f"{path / MARKER} is damaged: it does not name {file.name}", path=str(file))
    for name, written in expected.items():
        if name == OPTIMIZER and not with_optimizer:
            continue
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing from the checkpoint", path=str(file))
        if (size := file.stat().st_size) != written["bytes"]:
            raise CheckpointError(
                f"{file} is damaged: {size:,} bytes where {written['bytes']:,} were written", path=str(file)
            )
        if fingerprint(file) != written:
            raise CheckpointError(f"{file} is damaged: its sha256 is not the one that was written", path=str(file))


def _read_marker(path: Path) -> Fingerprints:
    """Read the size and sha256 of every file, by its path relative to the checkpoint."""
    try:
        written = json.loads((path / MARKER).read_text())
        expected: Fingerprints = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in written.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MARKER} file", path=str(path)) from None
    except Exception as error:  # the file can contain anything
        raise CheckpointError(f"{path / MARKER} is damaged: {reason(error)}", path=str(path)) from None
    tensors = [] if any(name.startswith(f"{SHARDS}/") for name in expected) else [OPTIMIZER]
    for name in ("config.json", "state.json", *tensors):
        if name not in expected:
            raise CheckpointError(f"{path / MARKER} is damaged: it does not name {name}", path=str(path))
    if odd := [name for name in expected if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name]:
        raise CheckpointError(f"{path / MARKER} is damaged: it names {shortened(odd[0])}", path=str(path))
    return expected


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders with a marker, earliest progress first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.match(path.name) and (path / MARKER).is_file()), key=_age)


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint with the most progress, or None."""
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def mark_damaged(path: Path) -> Path:
    """Rename a checkpoint to ``<name>.damaged``, so that it is no longer read, counted or pruned; return that path."""
    damaged = path.with_name(f"{path.name}.damaged")
    _remove(damaged)
    os.replace(path, damaged)
    sync(path.parent)
    return damaged


def prune_checkpoints(root: Path, keep_last: int, keep: str | None = None) -> None:
    """Delete all but the last ``keep_last`` mid-stage checkpoints; keep each stage's end and the one named ``keep``."""
    within = [path for path in complete_checkpoints(root) if not path.name.endswith("-end") and path.name != keep]
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


def _fingerprints(folder: Path, known: Fingerprints) -> Fingerprints:
    for path in (folder, *folder.rglob("*")):
        sync(path)
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: known.get(name) or fingerprint(file) for name, file in files.items()}


def _discard(path: Path) -> None:
    # Remove the marker first: a kill during the deletion must not leave a marked folder with missing files.
    (path / MARKER).unlink(missing_ok=True)
    _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether the error is a full disk, even if a library has wrapped it in its own error."""
    numbers = errno.ENOSPC, errno.EDQUOT
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def _versions() -> dict[str, str]:
    return {
        "steplm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
