"""Checkpoints in the background, and those of several ranks: each writes its rows, and reads the rows that it needs.

PyTorch's distributed checkpointing (DCP) writes and describes the files, in its safetensors format: nothing is
pickled, and any other number of ranks can read them.
"""

from __future__ import annotations

import hashlib
import os
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
from steplm.files import sync
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
    """The tensors in a folder of safetensors files, whole or in pieces; their values are read when asked for.

    Raises:
        CheckpointError: a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        except Exception as error:  # of any kind: it trusts what a header says
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
        """Name of the first file that holds a part of this tensor."""
        return Path(self._pieces[name][0].file).name

    def read(self, name: str, rows: Rows = WHOLE) -> Tensor:
        """These rows of a tensor, on the CPU."""
        try:
            return self._read(name, rows)
        except (RuntimeError, TypeError) as error:  # pieces that do not fit together
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
        """Those rows of every tensor whose name begins so, by the rest of the name."""
        return {name.removeprefix(prefix): self.read(name, rows) for name in self.shapes if name.startswith(prefix)}

    def _slice(self, piece: Piece, name: str, rows: slice | None) -> Tensor:
        try:
            with safe_open(piece.file, framework="pt") as file:
                return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{piece.file} is damaged: {reason(error)}", path=piece.file) from None


class Background:
    """Does one piece of work at a time in a thread, beside training."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Wait for the work before, and begin this."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A daemon, as it may wait for a rank that is gone, and must not keep the process.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is done.

        Raises:
            The error that stopped it.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self, seconds: float | None = None) -> None:
        """The same, or until so long has passed, of a run that fails for a reason of its own."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None


class BackgroundWriter(Background):
    """Writes checkpoints of several ranks while training goes on; one at a time.

    Every rank has one, and calls its methods at the same points.

    Args:
        rank: this process's.
        group: a gloo process group of its own, as its thread's collectives must not meet those of training.
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
        """Copy the tensors to host memory, and write them into ``folder`` beside what comes next.

        What fails on any rank, ``wait`` raises on every rank.

        Args:
            tensors: sharded ones as ``DTensor``; any other is the same on every rank.
            prepare: called on rank 0: makes the folder.
            finish: called on rank 0 when all ranks have written, with size and sha256 of every file.
            explain: called on the rank where something fails; every rank raises what it returns.
            discard: called on rank 0 after that.
        """
        self.wait()
        staged = {name: _on_host(tensor) for name, tensor in tensors.items()}

        def work() -> None:
            try:
                self._write(folder, staged, prepare, finish, explain)
            except BaseException:
                if self.rank == 0:
                    discard()
                raise

        self.begin(work)

    def _write(
        self,
        folder: Path,
        staged: dict[str, Tensor],
        prepare: Callable[[], None],
        finish: Callable[[Fingerprints], None],
        explain: Callable[[Exception], Exception],
    ) -> None:
        self._together(prepare if self.rank == 0 else None, explain)
        found = self._together(lambda: self._write_rows(folder, staged), explain)
        files = {name: value for part in found for name, value in part.items()}
        self._together((lambda: finish(files)) if self.rank == 0 else None, explain)

    def _write_rows(self, folder: Path, staged: dict[str, Tensor]) -> Fingerprints:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        writer.fs = HashingFileSystem()
        try:
            dcp.save(staged, storage_writer=writer, process_group=self.group)
        except CheckpointException as failed:  # no Exception: it would pass by whoever waits for one
            raise failed.failures[min(failed.failures)][0] from None
        for name in writer.fs.fingerprints:
            sync(folder / name)
        return writer.fs.fingerprints

    def _together(self, function: Callable[[], Any] | None, explain: Callable[[Exception], Exception]) -> list[Any]:
        """What each rank's function returns. What fails on one rank is raised on every rank."""
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
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": os.stat(file).st_size, "sha256": digest.hexdigest()}


def _on_host(tensor: Any) -> Any:
    """A copy in host memory, of a sharded tensor the rows that are here."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach().to("cpu", copy=True)
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
