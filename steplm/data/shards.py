"""Write token shards; a file gets its final name only when it is complete and on disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import Field

from steplm.data.tokens import Count, Shard, documents_by_length, offsets_file_bytes
from steplm.errors import DataError
from steplm.files import refusal, write_atomically
from steplm.types import from_json, to_json
from steplm.units import format_bytes

UNFINISHED = ".unfinished"
LOCK = ".lock"


@dataclass(frozen=True)
class WriterState:
    """The progress of a ``ShardWriter``: its finished shards, and the contents of the one being written."""

    num_shards: Count
    num_tokens: Count = 0
    num_text_bytes: Count = 0
    last_document: Annotated[int, Field(ge=-1)] = -1


class ShardWriter:
    """Appends documents to the shards of one split.

    A shard is closed after the document that fills it, so a document never spans two shards. Finished shards of
    an earlier, interrupted run are kept; its unfinished files are removed.

    Args:
        dtype: "uint16" or "uint32".
        shard_tokens: a shard is closed once it has this many tokens.
        state: resume from this state, even inside a shard; anything written later is dropped.
        end_of_text: the token that ends each document and occurs nowhere else; required with ``state``.

    Raises:
        ValueError: the files in the folder do not match ``state``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        shard_tokens: int,
        state: WriterState | None = None,
        end_of_text: int | None = None,
    ) -> None:
        self.folder = folder
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shard_tokens = shard_tokens
        folder.mkdir(parents=True, exist_ok=True)
        self.shards = _whole_shards(folder, self.dtype.itemsize)
        self._file: BinaryIO | None = None
        if state is not None:
            if len(self.shards) < state.num_shards:
                raise ValueError(f"{folder} has {len(self.shards)} whole shards of {state.num_shards}")
            del self.shards[state.num_shards :]
            if state.num_tokens:
                self._reopen(state, end_of_text)
        _remove_all_but(folder, self.shards, self._file)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        if state is not None:
            self.num_tokens += state.num_tokens

    def _reopen(self, state: WriterState, end_of_text: int | None) -> None:
        self._stem = self.folder / f"shard-{len(self.shards):05d}"
        path, closed = Path(f"{self._stem}.bin{UNFINISHED}"), Path(f"{self._stem}.bin")
        if closed.is_file() and not path.is_file():  # it was closed after the state was taken
            Path(f"{self._stem}.json").unlink(missing_ok=True)
            os.replace(closed, path)
        num_bytes = state.num_tokens * self.dtype.itemsize
        if not path.is_file() or path.stat().st_size < num_bytes:
            raise ValueError(f"{path} is shorter than {num_bytes:,} bytes")
        os.truncate(path, num_bytes)
        tokens = np.fromfile(path, self.dtype)
        self._digest = hashlib.sha256(tokens.tobytes())
        self._offsets = array("q", [0, *(np.flatnonzero(tokens == end_of_text) + 1).tolist()])
        if self._offsets[-1] != state.num_tokens:
            raise ValueError(f"{path} does not end with the end of a document")
        self._text_bytes, self._position = state.num_text_bytes, state.last_document
        self._file = path.open("ab")

    def state(self) -> WriterState:
        """Flush to disk, and return the state that is then safely stored."""
        if self._file is None:
            return WriterState(len(self.shards))
        _sync(self._file)
        return WriterState(len(self.shards), self._offsets[-1], self._text_bytes, self._position)

    @property
    def last_document(self) -> int:
        """Stream position of the last document in a closed shard; -1 before the first."""
        return self.shards[-1].last_document if self.shards else -1

    def append(self, position: int, tokens: npt.NDArray[np.unsignedinteger], num_text_bytes: int) -> None:
        """Add one document, the ``position``-th of the stream."""
        if self._file is None:
            self._stem = self.folder / f"shard-{len(self.shards):05d}"
            self._file = Path(f"{self._stem}.bin{UNFINISHED}").open("wb")  # noqa: SIM115
            self._digest, self._offsets, self._text_bytes = hashlib.sha256(), array("q", [0]), 0
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._text_bytes += num_text_bytes
        self._position = position
        self.num_tokens += len(tokens)
        if self._offsets[-1] >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        """Close the current shard, if any."""
        if self._file is None:
            return
        _sync(self._file)
        self._file.close()
        self._file = None
        os.replace(f"{self._stem}.bin{UNFINISHED}", f"{self._stem}.bin")
        starts = np.frombuffer(self._offsets, np.int64)
        self._add(starts, self._digest.hexdigest(), self._text_bytes, self._position)

    def add_file(
        self,
        tokens_file: Path,
        header_bytes: int,
        offsets: npt.NDArray[np.int64],
        tokens_sha256: str,
        num_text_bytes: int,
        last_document: int,
    ) -> None:
        """Add another program's token file as its own shard, without moving it."""
        self.close()
        place = {"tokens_file": str(tokens_file.resolve()), "header_bytes": header_bytes}
        self._add(offsets, tokens_sha256, num_text_bytes, last_document, **place)
        self.num_tokens += int(offsets[-1])

    def _add(
        self, offsets: npt.NDArray[np.int64], tokens_sha256: str, num_text_bytes: int, last_document: int, **place: Any
    ) -> None:
        """Write the offsets and the counts of a shard whose tokens are on disk."""
        name, data = f"shard-{len(self.shards):05d}", io.BytesIO()
        np.save(data, offsets.astype("<i8"), allow_pickle=False)
        shard = Shard(
            name=name,
            num_tokens=int(offsets[-1]),
            num_documents=len(offsets) - 1,
            num_text_bytes=num_text_bytes,
            last_document=last_document,
            tokens_sha256=tokens_sha256,
            offsets_sha256=hashlib.sha256(data.getvalue()).hexdigest(),
            documents_by_length=documents_by_length(offsets),
            **place,
        )
        write_atomically(self.folder / f"{name}.offsets.npy", data.getvalue())
        write_json(self.folder / f"{name}.json", to_json(shard))
        self.shards.append(shard)

    def abandon(self) -> None:
        """Stop, possibly inside a shard; everything covered by ``state`` stays on disk."""
        if self._file is not None:
            with suppress(OSError):  # on a full disk, closing fails too
                self._file.close()
            self._file = None


def _whole_shards(folder: Path, itemsize: int) -> list[Shard]:
    shards: list[Shard] = []
    while (path := folder / f"shard-{len(shards):05d}.json").is_file():
        try:
            shard = from_json(Shard, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError):
            break
        files = {
            shard.tokens_path(folder): shard.file_bytes(itemsize),
            path.with_suffix(".offsets.npy"): offsets_file_bytes(shard.num_documents),
        }
        if shard.name != path.stem or any(not f.is_file() or f.stat().st_size != size for f, size in files.items()):
            break
        shards.append(shard)
    return shards


def _remove_all_but(folder: Path, shards: list[Shard], unfinished: BinaryIO | None) -> None:
    whole = {shard.name for shard in shards}
    for file in folder.glob("shard-*"):
        if file.name.partition(".")[0] not in whole and (unfinished is None or str(file) != unfinished.name):
            file.unlink()


def write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lock ``folder`` for this process, creating it if needed; the lock is released when the process ends.

    Args:
        on_wait: called once before waiting, if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some shared file systems have no locks; there, running one process at a time is up to the user.
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors from a full or read-only disk into a ``DataError`` that says what to do."""
    try:
        yield
    except Exception as error:
        if (why := refusal(error)) is None:
            raise
        existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        raise DataError(
            f"cannot write to {folder}: {why} ({format_bytes(free)} free). Free some space or set "
            "data.prepared_dir to another disk, and start again: finished shards are kept.",
            path=str(folder),
            free_bytes=free,
        ) from None
