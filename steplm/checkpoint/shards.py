"""Background and multi-rank checkpoints: each rank writes its rows, and reads the rows that it needs.

PyTorch's distributed checkpointing (DCP) writes the files and their metadata in its safetensors format. Nothing is
pickled, and any number of ranks can read them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from steplm.checkpoint.hashed import Fingerprint, HashingFileSystem
from steplm.errors import CheckpointError
from steplm.files import file_sha256, sync
from steplm.rows import WHOLE, Rows
from steplm.units import reason

Fingerprints = dict[str, Fingerprint]  # by name


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a tensor, in one file."""

    file: str
    start: int
    stop: int


class TensorFiles:
    """The tensors in a folder of safetensors files, whole or split by rows; values are read on demand.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        except Exception as error:  # any type: the reader does not validate headers
            raise CheckpointError(
                f"the tensors in {folder} cannot be read: {reason(error)}", path=str(folder)
            ) from None
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[Piece]] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            self.shapes[name], self._dtypes[name] = entry.size, entry.properties.dtype
            pieces = []
            for chunk in entry.chunks:
                file = metadata.storage_data[MetadataIndex(name, chunk.offsets)].relative_path
                start = chunk.offsets[0] if chunk.offsets else 0
                pieces.append(Piece(file, start, start + (chunk.sizes[0] if chunk.sizes else 1)))
            num_rows = entry.size[0] if entry.size else 1
            if sum(piece.stop - piece.start for piece in pieces) < num_rows:
                raise CheckpointError(f"{folder} lacks some of the {num_rows:,} rows of {name}", path=str(folder))
            self._pieces[name] = pieces

    def file_of(self, name: str) -> str:
        """Name of the first file that contains rows of this tensor."""
        return Path(self._pieces[name][0].file).name

    def read(self, name: str, rows: Rows = WHOLE) -> Tensor:
        """Read these rows of a tensor, on the CPU."""
        try:
            return self._read(name, rows)
        except (RuntimeError, TypeError) as error:  # inconsistent pieces
            raise CheckpointError(
                f"{name} in {self.folder} is damaged: {reason(error)}", path=str(self.folder)
            ) from None

    def _read(self, name: str, rows: Rows) -> Tensor:
        shape = self.shapes[name]
        if not shape:
            return self._slice(self._pieces[name][0], name, None)
        wanted = rows.of(shape[0])
        if rows.is_whole and len(self._pieces[name]) == 1:
            return self._slice(self._pieces[name][0], name, slice(0, shape[0]))
        result = torch.empty((wanted.stop - wanted.start, *shape[1:]), dtype=self._dtypes[name])
        for piece in self._pieces[name]:
            start, stop = max(piece.start, wanted.start), min(piece.stop, wanted.stop)
            if start < stop:
                part = self._slice(piece, name, slice(start - piece.start, stop - piece.start))
                result[start - wanted.start : stop - wanted.start] = part
        return result

    def read_all(self, names: Iterable[str], rows: Rows = WHOLE) -> dict[str, Tensor]:
        return {name: self.read(name, rows) for name in names}

    def below(self, prefix: str, rows: Rows = WHOLE) -> dict[str, Tensor]:
        """Read these rows of every tensor whose name starts with ``prefix``, keyed by the rest of the name."""
        return {name.removeprefix(prefix): self.read(name, rows) for name in self.shapes if name.startswith(prefix)}

    def _slice(self, piece: Piece, name: str, rows: slice | None) -> Tensor:
        try:
            with safe_open(piece.file, framework="pt") as file:
                return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{piece.file} is damaged: {reason(error)}", path=piece.file) from None


class Background:
    """Runs one task at a time in a background thread while training continues."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Wait for the previous task, then start this one."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A daemon thread, because it may wait for a rank that is gone and must not keep the process alive.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the task is done.

        Raises:
            Exception: whatever the task raised.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self, seconds: float | None = None) -> None:
        """Like ``wait``, but for at most ``seconds`` and without raising, for runs that are failing anyway."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None


class BackgroundWriter(Background):
    """Writes multi-rank checkpoints, one at a time, while training continues.

    Every rank has its own writer and must call its methods at the same points.

    Args:
        rank: rank of this process.
        group: dedicated gloo process group: the thread's collectives must not interleave with those of training.
    """

    def __init__(self, rank: int, group: Any) -> None:
        super().__init__()
        self.rank, self.group = rank, group

    def start(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        *,
        prepare: Callable[[], None],
        finish: Callable[[Fingerprints], None],
        explain: Callable[[Exception], Exception] = lambda error: error,
        discard: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the tensors to host memory and write them into ``folder`` in the background.

        ``wait`` raises an error of any rank on every rank.

        Args:
            tensors: sharded tensors as ``DTensor``; any other is the same on every rank.
            prepare: called on rank 0 to create the folder.
            finish: called on rank 0 when all ranks have written, with the size and sha256 of every file.
            explain: called with the error on the rank that failed; every rank raises the error it returns.
            discard: called on rank 0 after a failure.
        """
        self.wait()
        staged = {name: _on_host(tensor) for name, tensor in tensors.items()}

        def work() -> None:
            try:
                self._together(prepare if self.rank == 0 else None, explain)
                found = self._together(lambda: self._write_rows(folder, staged), explain)
                files = {name: value for part in found for name, value in part.items()}
                self._together((lambda: finish(files)) if self.rank == 0 else None, explain)
            except BaseException:
                if self.rank == 0:
                    discard()
                raise

        self.begin(work)

    def _write_rows(self, folder: Path, staged: dict[str, Tensor]) -> Fingerprints:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        writer.fs = HashingFileSystem()
        try:
            dcp.save(staged, storage_writer=writer, process_group=self.group)
        except CheckpointException as failed:  # a BaseException, which `except Exception` would miss
            raise failed.failures[min(failed.failures)][0] from None
        for name in writer.fs.fingerprints:
            sync(folder / name)
        return writer.fs.fingerprints

    def _together(self, function: Callable[[], Any] | None, explain: Callable[[Exception], Exception]) -> list[Any]:
        """Gather the results of all ranks' functions; an error on one rank is raised on every rank."""
        result, failure = None, None
        try:
            result = None if function is None else function()
        except Exception as error:
            failure = explain(error)
        outcomes: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(outcomes, (result, failure), group=self.group)
        if failures := [failure for _, failure in outcomes if failure is not None]:
            raise failures[0]
        return [result for result, _ in outcomes]


def fingerprint(file: Path) -> Fingerprint:
    """Size and sha256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _on_host(tensor: Any) -> Any:
    """Copy to host memory; of a sharded tensor, only this rank's rows."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach().to("cpu", copy=True)
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
