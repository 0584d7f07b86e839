"""The set of documents seen during preparation, as hashes on disk, so that memory does not grow with their number."""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

LOG = "documents.hashes"
FIRST_SLOTS = 2**20


class SeenDocuments:
    """A set of 64-bit hashes, in insertion order.

    Documents with the same hash count as duplicates. Among 200 million documents, the probability of any collision is
    about 1 in 1000.

    The set is a list of hash tables in memory-mapped temporary files, each twice as large as the previous one and at
    most half full. The system keeps them in memory as far as there is room. A log stores the hashes in order; an
    interrupted preparation rebuilds the tables from the first entries of the log.

    Args:
        folder: folder of the log and the tables; None keeps everything in memory, without a log.
        num_documents: number of log entries to keep.

    Raises:
        ValueError: the log has fewer entries.
    """

    def __init__(self, folder: Path | None, num_documents: int = 0) -> None:
        self.folder = folder
        self._tables: list[_Table] = []
        self._log = None
        if folder is None:
            return
        path = folder / LOG
        num_logged = path.stat().st_size // 8 if path.is_file() else 0
        if num_logged < num_documents:
            raise ValueError(f"{path} has {num_logged:,} hashes of {num_documents:,} documents")
        kept = np.memmap(path, "<u8", "r", shape=(num_documents,)) if num_documents else np.empty(0, "<u8")
        for start in range(0, num_documents, 2**16):
            for key in kept[start : start + 2**16].tolist():
                self._insert(key)
        self._log = path.open("r+b" if num_documents else "wb")
        self._log.truncate(8 * num_documents)
        self._log.seek(8 * num_documents)

    def add(self, key: int) -> bool:
        """Add ``key``, from 0 to 2**64 - 1; return whether it is new."""
        if not self._insert(key):
            return False
        if self._log is not None:
            self._log.write(key.to_bytes(8, "little"))
        return True

    def sync(self) -> None:
        """Wait until the log is on disk."""
        if self._log is not None:
            self._log.flush()
            os.fsync(self._log.fileno())

    def close(self, *, remove: bool = False) -> None:
        """Close the log; with ``remove``, also delete it, as a finished preparation no longer needs it."""
        if self._log is not None:
            with suppress(OSError):  # on a full disk, closing fails too
                self._log.close()
            if remove:
                Path(self._log.name).unlink(missing_ok=True)

    def _insert(self, key: int) -> bool:
        key = key or 1  # 0 is an empty slot
        slot = -1
        for table in self._tables:
            slot = table.slot_of(key)
            if table.slots[slot]:
                return False
        if not self._tables or self._tables[-1].is_full:
            self._tables.append(_Table(FIRST_SLOTS << len(self._tables), self.folder))
            slot = self._tables[-1].slot_of(key)
        self._tables[-1].put(slot, key)
        return True


class _Table:
    """A hash table with open addressing and linear probing."""

    def __init__(self, num_slots: int, folder: Path | None) -> None:
        if folder is None:
            data = mmap.mmap(-1, 8 * num_slots)
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Allocate the blocks now: writing to a sparse mapped file on a full disk would kill the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, 8 * num_slots)
                else:
                    file.truncate(8 * num_slots)
                data = mmap.mmap(file.fileno(), 8 * num_slots)
        self.slots = memoryview(data).cast("Q")
        self.mask = num_slots - 1
        self.num_left = num_slots // 2

    @property
    def is_full(self) -> bool:
        return self.num_left == 0

    def slot_of(self, key: int) -> int:
        """The slot of ``key``, or the empty slot where it would go."""
        slots, mask = self.slots, self.mask
        slot = key & mask
        while (found := slots[slot]) and found != key:
            slot = (slot + 1) & mask
        return slot

    def put(self, slot: int, key: int) -> None:
        self.slots[slot] = key
        self.num_left -= 1
