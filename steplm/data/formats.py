"""File formats of text: turn a byte stream into records, one at a time.

A record is ``(place, value)``. The place is a line or a row, counted from 1. The value is a mapping with the fields
of the record, or the text itself. If the record cannot be read, the value is an exception that says why.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from steplm.files import is_unicode
from steplm.units import reason, shortened

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch

TEXT_PIECE_BYTES = 32 * 2**10
ROWS_AT_ONCE = 1024

Place = int | str
Record = tuple[Any, Any]  # Place, value
Fields = Collection[str] | None  # the fields to read; None: all. A format may return more.


def listed(names: Iterable[str]) -> str:
    """The first ten of ``names``, quoted, for a message."""
    first = [shortened(name, 40) for name in islice(names, 11)]
    return ", ".join(first if len(first) < 11 else [*first[:10], "..."])


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, 1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decode(data: bytes) -> str | ValueError:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _not_utf8(error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"not UTF-8: {error.reason}")


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the value of a repeated key is an exception that says so."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = _repeated(name for name, _ in pairs)
        found |= {name: ValueError(f"the key {shortened(name, 40)} is repeated") for name in names}
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_as_object)
_BEFORE_PLACE = re.compile("( starting)? at$|: ?$")  # how some of its messages lead to a line and a column


def parse_json(data: str | bytes) -> Any:
    """The JSON value, or an exception if there is none; the value of a repeated key is an exception too."""
    text = data if isinstance(data, str) else _decode(data)
    if isinstance(text, ValueError):
        return text
    try:
        return _JSON.decode(text.rstrip("\r\n"))  # else the end of a line counts as part of a cut string
    except json.JSONDecodeError as error:
        # A record of one line is placed by its file and line; equal reasons are counted together.
        where = f" at line {error.lineno}" if "\n" in text.strip() else ""
        return ValueError(f"broken JSON: {_BEFORE_PLACE.sub('', error.msg)}{where}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"broken JSON: {error}")


def first_error(values: Iterable[Any]) -> Exception | None:
    """The first exception among these JSON values and the values inside them."""
    waiting = list(values)
    for value in waiting:
        if isinstance(value, str):
            continue
        if isinstance(value, Exception):
            return value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return None


def _as_record(value: Any, fields: Fields) -> Any:
    if isinstance(value, Exception):
        return value
    if not isinstance(value, dict):
        return ValueError(f"a JSON {type(value).__name__}, not an object with fields")
    return first_error(value.values() if fields is None else map(value.get, fields)) or value


def _read_json_lines(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    for number, line in _lines(stream):
        if line.strip():
            yield number, _as_record(parse_json(line), fields)


def _read_json(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    """Read one object, a list of objects, such a list under the key ``data``, or (as is common) one object per line.

    An object with one of the fields to read is a record, whatever its key ``data`` holds.

    Only one object per line is streamed; the other forms are loaded into memory as a whole.
    """
    lines = ((number, line) for number, line in _lines(stream) if line.strip())
    number, first = next(lines, (0, b""))
    if not first:
        return
    value = parse_json(first)
    second = next(lines, None)
    if isinstance(value, dict) and second is not None:
        yield number, _as_record(value, fields)
        for number, line in chain([second], lines):
            yield number, _as_record(parse_json(line), fields)
        return
    if second is not None:
        rest = [second, *lines]
        value = parse_json(b"".join([first, *(line for _, line in rest)]))
        if isinstance(value, Exception) and not first.lstrip().startswith(b"["):
            # Either one broken object, or one object per line with a broken first line.
            records = [(number, _as_record(parse_json(line), fields)) for number, line in [(number, first), *rest]]
            if any(isinstance(record, dict) for _, record in records):
                yield from records
                return
    if (
        isinstance(value, dict)
        and isinstance(value.get("data"), list | Exception)
        and value.keys().isdisjoint(fields or ())
    ):
        value = value["data"]
    for place, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield place, _as_record(record, fields)


def _read_text(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    """Split the file into documents of 32 to 64 KiB at blank lines, or at any line if no blank line comes in time.

    With one document per file, a single large file would leave nothing to split off for validation.
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


def _read_csv(stream: BinaryIO, fields: Fields, *, delimiter: str = ",") -> Iterator[Record]:
    """Read rows under a header of names; the place of a record is its first line."""
    csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB
    # Bytes that are not UTF-8 become lone surrogates, so that they invalidate only their own row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    is_at_end = False

    def lines() -> Iterator[str]:
        nonlocal is_at_end
        yield from text
        is_at_end = True

    rows = csv.reader(lines(), delimiter=delimiter)
    names: list[str] = []
    twice: list[str] = []
    while True:
        place = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield place, ValueError(f"broken CSV: {error}")
            continue
        if row is None:
            return
        if is_at_end:  # a row that is complete does not ask for another line
            yield place, ValueError("broken CSV: a quote that is never closed, the rest of the file is lost")
            return
        if not names:
            names, twice = row, _repeated(_used(row, fields))
        elif row:
            yield place, _repeated_column(twice) if twice else _csv_record(names, row, fields)


def _repeated_column(names: list[str]) -> ValueError:
    return ValueError(f"the column {listed(names)} is repeated")


def _csv_record(names: list[str], row: list[str], fields: Fields) -> Any:
    if len(row) != len(names):
        return ValueError(f"the row has {len(row)} value{'s' * (len(row) > 1)}, and the header has {len(names)} names")
    record = dict(zip(names, row, strict=True))
    read = "".join(value for name, value in record.items() if fields is None or name in fields)
    return record if is_unicode(read) else ValueError("not UTF-8")


def _read_parquet(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(stream)
        names, num_groups = table.schema_arrow.names, table.num_row_groups
    except Exception as error:
        yield 1, _damage(error)
        return
    used = _used(names, fields)
    first_row = 1
    for group in range(num_groups):
        last_row = first_row + table.metadata.row_group(group).num_rows - 1
        batches = table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=used)
        yield from _table_records(batches, names, fields, first_row, f", rows up to {last_row:,} are lost")
        first_row = last_row + 1


def _read_arrow(stream: BinaryIO, fields: Fields) -> Iterator[Record]:
    """Read Arrow's stream format, which ``datasets`` writes, or its file format."""
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    batches: Iterator[RecordBatch]
    try:
        if is_file:
            file = ipc.open_file(stream)
            names = file.schema.names
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            reader = ipc.open_stream(stream)
            names, batches = reader.schema.names, iter(reader)
    except Exception as error:
        yield 1, _damage(error)
        return
    used = _used(names, fields)
    checked = (_checked(batch.select(used)) for batch in batches)
    yield from _table_records(checked, names, fields, 1, ", the rest of the file is lost")


def _used(names: Iterable[str], fields: Fields) -> list[str]:
    return [name for name in names if fields is None or name in fields]


def _checked(batch: RecordBatch) -> RecordBatch:
    """Validate a batch, as string offsets in a damaged mapped file may point anywhere; invalid UTF-8 is allowed."""
    for column in batch.columns:
        column.view(_as_binary(column.type)).validate(full=True)
    return batch


def _as_binary(kind: DataType) -> DataType:
    """The type with binary in place of strings, at any depth."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_binary(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_as_binary(kind.value_type)))
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _as_binary(kind.value_type))
    strings = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return strings.get(kind, kind)


def _table_records(
    batches: Iterator[RecordBatch], names: list[str], fields: Fields, first_row: int, lost: str
) -> Iterator[Record]:
    used, problem = _used(names, fields), None
    if twice := _repeated(used):
        problem = _repeated_column(twice)
    elif not used:
        problem = ValueError(f"no column {listed(fields or ())}; columns are {listed(names)}")
    row = first_row
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            yield row, _damage(error, lost)
            return
        if batch is None:
            return
        records = [problem] * batch.num_rows if problem else _rows(batch)
        yield from enumerate(records, row)
        row += batch.num_rows


def _damage(error: Exception, lost: str = "") -> ValueError:
    """Turn any of Arrow's errors for damaged files into one; re-raise I/O errors, which are not damage to the file."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return ValueError(f"a damaged table{lost}: {reason(error)}")


def _rows(batch: RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except Exception:  # errors depend on the column type: invalid UTF-8, dates out of range
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


Reader = Callable[[BinaryIO, Fields], Iterator[Record]]

READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".raw": _read_text,
    ".tokens": _read_text,
}
RANDOM_ACCESS = (".parquet", ".arrow")  # need random access, so they cannot be compressed files


def _open_zstd(stream: BinaryIO) -> BinaryIO:
    import pyarrow

    raw: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
    return io.BufferedReader(raw)


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


def split_format(path: Path) -> tuple[str, str]:
    """The format extension of a file and that of its compression, such as ``(".jsonl", ".gz")``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    name = suffixes[-1] if suffixes else ""
    return (name + compression, "") if name in ("", *RANDOM_ACCESS) else (name, compression)


def is_readable(path: Path) -> bool:
    return split_format(path)[0] in READERS


def is_plain_text(path: Path) -> bool:
    """Whether the file is plain text rather than a table or list of records."""
    return READERS.get(split_format(path)[0]) is _read_text


def known_formats() -> str:
    tables, compressions = ", ".join(READERS), ", ".join(COMPRESSIONS)
    return f"Known: {tables}; compressed ({compressions}) all of them but {' and '.join(RANDOM_ACCESS)}."


def read_records(stream: BinaryIO, path: Path, fields: Fields) -> Iterator[Record]:
    """Yield the records of an open file, in the format given by its name."""
    name, compression = split_format(path)
    if not compression:
        yield from READERS[name](stream, fields)
        return
    place = 0
    try:
        for place, value in READERS[name](COMPRESSIONS[compression](stream), fields):
            yield place, value
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # an I/O error, not a damaged file
            raise
        lost = f"damaged or truncated {compression}, the rest of the file is lost"
        yield place + 1, ValueError(f"{lost}: {error}")
