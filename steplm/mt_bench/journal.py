"""A file of JSON lines that only grows: what was paid for, in time or money, is on the disk before it is used."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from steplm.errors import DataError, SteplmError
from steplm.files import sync
from steplm.units import reason


class Journal:
    """Rows of an append-only file. One process holds it at a time; threads may append together.

    A line that a kill tore is cut off when the file is opened.

    Raises:
        DataError: a line that is no JSON object and not the last.
        SteplmError: another process holds the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self.path = path
        self._lock = threading.Lock()
        self._stream = path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise SteplmError(
                f"another process writes {path}. Wait for it, stop it, or use another --output.", path=str(path)
            ) from None
        try:
            self.rows = self._heal()
        except BaseException:
            self.close()
            raise
        if is_new:
            sync(path.parent)

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows; on return they survive a power cut."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._lock:
            self._stream.write(text.encode("utf-8", "replace"))
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self.rows.extend(rows)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heal(self) -> list[dict[str, Any]]:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines(keepends=True)
        if lines and _row(lines[-1]) is None:  # its end reached the disk, its middle did not
            whole -= len(lines.pop())
        if whole < len(content):
            self._stream.truncate(whole)
            os.fsync(self._stream.fileno())
        return [_checked(self.path, number, line) for number, line in enumerate(lines, 1)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; empty lines are passed over.

    Raises:
        DataError: no such file, or a line that is no JSON object.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", path=str(path)) from None
    return [_checked(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _checked(path: Path, number: int, line: bytes) -> dict[str, Any]:
    row = _row(line)
    if row is None:
        try:
            json.loads(line)
            why = "it is no JSON object"
        except (ValueError, RecursionError) as error:
            why = reason(error)
        raise DataError(f"{path}, line {number}: {why}", path=str(path), line=number)
    return row
