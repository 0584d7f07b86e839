"""JSON Lines files, and an append-only journal that saves at once what cost time or money."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from steplm.data.formats import first_error, parse_json
from steplm.errors import DataError, SteplmError
from steplm.files import sync, write_errors
from steplm.units import reason

Row = TypeVar("Row")


class Journal(Generic[Row]):
    """Rows of an append-only file, which one process holds at a time; its threads may append concurrently.

    A last line left incomplete by a killed process is removed when the file is opened.

    Args:
        kind: the type of each line, e.g. a dataclass; other keys are ignored.

    Raises:
        DataError: a line is not of this type.
        SteplmError: another process holds the file.
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path = path
        self._adapter: TypeAdapter[Row] = TypeAdapter(kind)
        self._lock = threading.Lock()
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows = self._healed()
        except BlockingIOError:
            self.close()
            raise SteplmError(
                f"another process writes {path}. Wait for it, stop it, or use another --output.", path=str(path)
            ) from None
        except BaseException:
            self.close()
            raise
        sync(path.parent)

    def append(self, *rows: Row) -> None:
        """Write rows; on return they survive a power cut, and if writing fails, none of them remains."""
        data = b"".join(self._adapter.dump_json(row) + b"\n" for row in rows)
        with self._lock, write_errors(self.path):
            size = os.fstat(self._stream.fileno()).st_size
            try:
                while data:
                    data = data[self._stream.write(data) :]
                os.fsync(self._stream.fileno())
            except BaseException:
                self._stream.truncate(size)
                raise
            self.rows.extend(rows)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Journal[Row]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _healed(self) -> list[Row]:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines(keepends=True)
        if lines and not _is_json(lines[-1]):  # its end reached the disk, its middle did not
            whole -= len(lines.pop())
        if whole < len(content):
            self._stream.truncate(whole)
            os.fsync(self._stream.fileno())
        return _parsed(self.path, lines, self._adapter)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read the rows of a JSON Lines file; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, or a line is not of this type.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", path=str(path)) from None
    return _parsed(path, lines, TypeAdapter(kind))


def parsed_row(where: str, line: str | bytes, adapter: TypeAdapter[Row]) -> Row:
    """Parse a row from JSON in strict mode (a string is not a number); ``DataError`` says where and what is wrong."""
    try:
        row = adapter.validate_json(line, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] != "json_invalid":
            raise DataError(f"{where}: {reason(error)}") from None
        why = problem["ctx"]["error"]
        half = ", half of a surrogate pair" if "hex escape" in why or "surrogate" in why else ""
        raise DataError(f"{where}: not valid JSON: {why}{half}") from None
    if repeated := first_error([parse_json(line)]):
        raise DataError(f"{where}: {repeated}")
    return row


def _parsed(path: Path, lines: list[bytes], adapter: TypeAdapter[Row]) -> list[Row]:
    return [parsed_row(f"{path}, line {number}", line, adapter) for number, line in enumerate(lines, 1) if line.strip()]


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
