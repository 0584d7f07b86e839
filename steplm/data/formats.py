"""The formats of text files: a stream of bytes becomes records, one at a time.

A record is ``(place, value)``. The place is a line or a row, counted from 1. The value is a mapping with the fields
of the record, or the text itself; for a record that cannot be read it is an exception that says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, BinaryIO

from steplm.units import reason, shortened

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

TEXT_PIECE_BYTES = 32 * 2**10
ROWS_AT_ONCE = 1024

Record = tuple[int, Any]
Fields = Collection[str] | None  # the fields that are used; None: all. A format may give more.


def listed(names: Iterable[str], most: int = 10) -> str:
    """The first of ``names``, quoted, for a message."""
    first = [shortened(name, 40) for name in islice(names, most + 1)]
    return ", ".join([*first[:most], *(["..."] if len(first) > most else [])])


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, 1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decode(data: bytes) -> str | ValueError:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _not_utf8(error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"not UTF-8: {error.reason} at byte {error.start}")


def _parse_json(data: bytes) -> Any:
    text = _decode(data)
    if isinstance(text, ValueError):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"broken JSON: {error}")


def _as_record(value: Any) -> Any:
    if isinstance(value, dict | Exception):
        return value
    return ValueError(f"a JSON {type(value).__name__}, not an object with fields")


def _read_json_lines(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    for number, line in _lines(stream):
        if line.strip():
            yield number, _as_record(_parse_json(line))


def _read_json(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    """One object, a list of objects, or such a list under the key ``data``; or, as is common, an object per line.

    Only the last is read line by line. The others are held in memory as a whole.
    """
    lines = ((number, line) for number, line in _lines(stream) if line.strip())
    number, first = next(lines, (0, b""))
    if not first:
        return
    value = _parse_json(first)
    second = next(lines, None)
    if isinstance(value, dict) and second is not None:
        yield number, value
        for number, line in chain([second], lines):
            yield number, _as_record(_parse_json(line))
        return
    if second is not None:
        rest = [second, *lines]
        value = _parse_json(b"".join([first, *(line for _, line in rest)]))
        if isinstance(value, Exception) and not first.lstrip().startswith(b"["):
            # Either one broken object, or an object per line of which the first is broken.
            records = [(number, _as_record(_parse_json(line))) for number, line in [(number, first), *rest]]
            if any(isinstance(record, dict) for _, record in records):
                yield from records
                return
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    for place, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield place, _as_record(record)


def _read_text(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    """Documents of 32 to 64 KiB, cut at blank lines (at any line where none comes); put together, the file.

    One document per file would leave nothing to split off for validation where there is one large file.
    """
    piece: list[bytes] = []
    start, size = 1, 0
    for number, line in _lines(stream):
        if not piece:
            start = number
        piece.append(line)
        size += len(line)
        if size >= TEXT_PIECE_BYTES and (not line.strip() or size >= 2 * TEXT_PIECE_BYTES):
            yield start, _decode(b"".join(piece))
            piece, size = [], 0
    if b"".join(piece).strip():
        yield start, _decode(b"".join(piece))


def _read_parquet(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    from pyarrow import parquet

    first_row = 1
    try:
        table = parquet.ParquetFile(stream)
        names, num_groups = table.schema_arrow.names, table.num_row_groups
    except Exception as error:
        yield 1, _damage(error, "Parquet")
        return
    used = names if fields is None else [name for name in names if name in fields]
    for group in range(num_groups):
        num_rows = table.metadata.row_group(group).num_rows
        if used:
            yield from _read_row_group(table, group, used, first_row, num_rows)
        else:
            missing = ValueError(f"no column {listed(fields or ())}; columns are {listed(names)}")
            yield from ((first_row + row, missing) for row in range(num_rows))
        first_row += num_rows


def _read_row_group(
    table: ParquetFile, group: int, columns: list[str], first_row: int, num_rows: int
) -> Iterator[Record]:
    row = first_row
    batches = table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            yield row, _damage(error, "Parquet", f", rows up to {first_row + num_rows - 1:,} are lost")
            return
        if batch is None:
            return
        for record in _rows(batch):
            yield row, record
            row += 1


def _damage(error: Exception, what: str, lost: str = "") -> ValueError:
    """Arrow has an error for each kind of damage; what the disk refuses is no damage of the file."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return ValueError(f"damaged {what}{lost}: {reason(error)}")


def _rows(batch: RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except Exception:  # each type of column fails in its own way: strings that are not UTF-8, dates out of range
        return [_row(batch, index) for index in range(batch.num_rows)]


def _row(batch: RecordBatch, index: int) -> Any:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return _not_utf8(error)
        except Exception as error:
            return ValueError(f"column {shortened(name, 40)} cannot be read: {reason(error)}")
    return values


READERS: dict[str, Callable[[BinaryIO, Fields], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".raw": _read_text,
    ".tokens": _read_text,
}
