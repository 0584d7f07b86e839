from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.errors import WriteError
from steplm.files import as_unicode, is_unicode, replacing, write_atomically, write_errors


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, "old")
    write_atomically(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]

    def fails(descriptor: int) -> None:
        raise OSError("power is gone")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="power"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "größer", "the new text is not on the disk yet"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_grows_too_large_is_one_line_and_the_old_one_stays(
    tmp_path: Path, largest_file: Callable[[int], Any]
) -> None:
    path = tmp_path / "new/plan.json"
    write_atomically(path, b"old")
    with largest_file(100), pytest.raises(WriteError, match=r"^cannot write .*plan\.json: File too large$"):
        write_atomically(path, "x" * 1000)
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("plan.json", "old")]


def test_a_folder_takes_the_place_of_another_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "export"

    def write(name: str) -> None:
        with replacing(folder) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / name).touch()
            if name == "third":
                raise RuntimeError("killed")

    write("first")
    write("second")
    with pytest.raises(RuntimeError, match="killed"):
        write("third")
    assert [file.relative_to(tmp_path) for file in tmp_path.rglob("*")] == [
        Path("export"), Path("export/inner"), Path("export/inner/second"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "…"), r"No space left on device \([\d,]+ bytes are free in "),
        (OSError(errno.EDQUOT, "…"), "Disk quota exceeded"),
        (OSError(errno.EROFS, "…"), "Read-only file system"),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "a write failed"),
    ],
)
def test_whatever_the_file_system_refuses_is_one_line_with_the_file_and_the_reason(
    tmp_path: Path, error: Exception, why: str
) -> None:
    with pytest.raises(WriteError, match=rf"^cannot write {tmp_path / 'run'}: {why}"), write_errors(tmp_path / "run"):
        raise error


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"^cannot write .*file/run/plan\.json: Not a directory"):
        write_atomically(tmp_path / "file/run/plan.json", "")


def test_errors_of_another_kind_or_of_other_files_stay_what_they_are(tmp_path: Path) -> None:
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "x"), PermissionError(errno.EACCES, "x", "/etc/x")):
        with pytest.raises(type(error), match="x"), write_errors(tmp_path / "run"):
            raise error


def test_lone_surrogates_are_found_and_replaced() -> None:
    assert is_unicode("Größe 🌱")
    assert not is_unicode("half \ud83d")
    assert as_unicode("half \ud83d, whole 🌱") == "half \N{REPLACEMENT CHARACTER}, whole 🌱"
