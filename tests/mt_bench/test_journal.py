"""What was saved survives a kill at any byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from steplm.errors import DataError, SteplmError
from steplm.mt_bench.journal import Journal, read_rows


def test_a_file_cut_at_any_byte_opens_with_its_whole_rows_and_grows_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    rows = [{"a": "ä\n\u2028"}, {"b": [1, 2]}, {"c": {}}]
    with Journal(path) as journal:
        journal.append(rows[0])
        journal.append(*rows[1:])
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        with Journal(path) as journal:
            assert journal.rows == rows[:whole]
            journal.append({"d": 1})
        assert read_rows(path) == [*rows[:whole], {"d": 1}]


def test_a_last_line_of_zeros_is_cut_off_and_a_damaged_line_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n\0\0\0\n')
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\nrubbish\n{"b": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        Journal(path)
    with pytest.raises(DataError, match="line 2"):
        read_rows(path)


def test_a_file_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path), pytest.raises(SteplmError, match="another process writes"):
        Journal(path)
    Journal(path).close()
