from __future__ import annotations

import os
from pathlib import Path

import pytest

from steplm.files import write_atomically


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
