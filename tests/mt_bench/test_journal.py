"""What was saved survives a kill at any byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steplm.errors import DataError, SteplmError, WriteError
from steplm.mt_bench.journal import Journal, read_rows

Row = dict[str, Any]


def test_a_file_cut_at_any_byte_opens_with_its_whole_rows_and_grows_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    rows = [{"a": "ä\n\u2028"}, {"b": [1, 2]}, {"c": {}}]
    with Journal(path, Row) as journal:
        journal.append(rows[0])
        journal.append(*rows[1:])
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        with Journal(path, Row) as journal:
            assert journal.rows == rows[:whole]
            journal.append({"d": 1})
        assert read_rows(path, Row) == [*rows[:whole], {"d": 1}]


def test_a_last_line_of_zeros_is_cut_off_and_a_damaged_line_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n\0\0\0\n')
    with Journal(path, Row) as journal:
        assert journal.rows == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\nrubbish\n{"b": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        Journal(path, Row)
    with pytest.raises(DataError, match="line 2"):
        read_rows(path, Row)


def test_a_file_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, Row), pytest.raises(SteplmError, match="another process writes"):
        Journal(path, Row)
    Journal(path, Row).close()


def test_a_write_that_is_refused_leaves_the_rows_before_it(tmp_path: Path, largest_file: Callable[[int], Any]) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, Row) as journal:
        journal.append({"a": 1})
        with largest_file(20), pytest.raises(WriteError, match=r"^cannot write .*journal\.jsonl: File too large$"):
            journal.append({"b": "x" * 30})
        assert path.read_bytes() == b'{"a":1}\n'
        journal.append({"c": 2})
    assert read_rows(path, Row) == [{"a": 1}, {"c": 2}]


@dataclass(frozen=True)
class Typed:
    number: int
    turns: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            '{"number": 1, "turns": ["\\ud83d"]}',
            "not valid JSON: unexpected end of hex escape at line 1 column 32, half of a surrogate pair$",
        ),
        ('{"number": null}', "number: Input should be a valid integer, not None"),
        ('{"number": "1"}', "number: Input should be a valid integer"),
        ('{"number": 1, "turns": [null]}', "turns.0: Input should be a valid string"),
        ('{"number": 1, "number": 2}', "the key 'number' is repeated"),
        ("[1]", "Input should be an object"),
        ("\udcff", "not valid JSON: expected value"),
    ],
)
def test_a_row_of_another_kind_is_named_by_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"number": 1}\n\n' + line.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: .*{why}"):
        read_rows(path, Typed)
