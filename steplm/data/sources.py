"""Where text comes from: files, folders, the hub and the built-in corpus, as one stream of documents.

A record that cannot be used is counted in ``BadRecords`` and skipped; whether there are too many is
for the caller to decide (``BadRecords.check``).
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from steplm.data.builtin import describe_python_docs, python_docs
from steplm.errors import DataError, HubUnavailable
from steplm.units import nearest, reason, shortened

NUM_EXAMPLES = 10
TEXT_PIECE_BYTES = 32 * 2**10
HUB_RETRY_SECONDS = (1, 5, 25, 125)  # waits after a stream has broken off
COMMIT = re.compile("[0-9a-f]{40}")
HUB_KEYS = ("name", "split", "revision", "data_dir", "data_files")


@dataclass(frozen=True)
class Document:
    text: str
    origin: str  # "FILE:LINE"


@dataclass(frozen=True)
class BadRecord:
    origin: str
    reason: str


@dataclass
class BadRecords:
    """How many records were read, how many of them were unusable, and the first few of those."""

    num_records: int = 0
    num_bad: int = 0
    examples: list[BadRecord] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.num_bad / max(self.num_records, 1)

    def add(self, origin: str, reason: str) -> None:
        self.num_records += 1
        self.num_bad += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(BadRecord(origin, reason))

    def snapshot(self) -> BadRecords:
        return BadRecords(self.num_records, self.num_bad, list(self.examples))

    def check(self, max_bad_share: float) -> None:
        """Raise ``DataError``, with the first examples, if more than this share of the records is bad."""
        if self.num_bad and self.share > max_bad_share:
            examples = "\n".join(f"  {bad.origin}: {bad.reason}" for bad in self.examples)
            raise DataError(
                f"{self.num_bad:,} of {self.num_records:,} records ({self.share:.2%}) are unusable, "
                f"more than data.max_bad_share={max_bad_share}:\n{examples}\n"
                "Mend the files, name the right data.text_field, or raise data.max_bad_share.",
                num_bad=self.num_bad,
                num_records=self.num_records,
                max_bad_share=max_bad_share,
            )


# A record is (place in the file, value). The value is a mapping with the text field, or the text itself,
# or, if the record is broken, an exception that says why.
Record = tuple[int, Any]


@dataclass(frozen=True)
class Source:
    """One file, one hub data set, or the built-in corpus."""

    name: str
    path: Path | None = None

    def describe(self) -> str:
        """Changes whenever the content does, as far as its size and its two ends can tell.

        Neither the folder nor the time of modification counts: a copied or moved file is the same text.
        """
        if self.path is not None:
            return f"{self.path.name} ({self.path.stat().st_size} bytes, ends {_digest_of_ends(self.path)})"
        return describe_python_docs() if self.name.startswith("builtin://") else self.name

    @property
    def is_pinned(self) -> bool:
        """Whether ``describe`` tells all: on the hub a text can change under its name, unless a commit is given."""
        if self.path is not None or not self.name.startswith("hub://"):
            return True
        return COMMIT.fullmatch(_hub_arguments(self.name)[1].get("revision", "")) is not None

    def documents(self, text_field: str, bad: BadRecords) -> Iterator[Document]:
        """The documents in order; unusable records go to ``bad``.

        Raises:
            DataError: the source cannot be read at all.
        """
        yield from _usable(self.name, self.records(text_field), text_field, bad)

    def records(self, field: str | None = None) -> Iterator[Record]:
        """Each record with its place; for one that cannot be read, an exception that says why.

        Args:
            field: the only one that is asked for, where the format can read it alone; default: all.

        Raises:
            DataError: the source cannot be read at all.
        """
        if self.path is None:
            yield from STREAMS[self.name.partition("://")[0]](self.name)
            return
        place = 0
        with _errors_of(self.path), self.path.open("rb") as raw:
            is_gzip = self.path.suffix.lower() == ".gz"
            stream: Any = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            try:
                for place, value in READERS[_format(self.path)](stream, field):
                    yield place, value
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield place + 1, ValueError(f"damaged or truncated gzip, the rest of the file is lost: {error}")


def _digest_of_ends(path: Path, num_bytes: int = 2**16) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(num_bytes))
        stream.seek(max(path.stat().st_size - num_bytes, 0))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


def find_sources(entries: Sequence[str]) -> list[Source]:
    """The sources that the entries name, each once, in order; the files of a folder or glob sorted by name.

    Raises:
        DataError: an entry matches nothing or has an unknown format.
    """
    sources: list[Source] = []
    for entry in entries:
        if "://" in entry:
            sources.append(_remote(entry))
        else:
            sources += [Source(str(path), path) for path in _matching_files(entry)]
    return list(dict.fromkeys(sources))


def _remote(entry: str) -> Source:
    scheme, _, rest = entry.partition("://")
    if scheme not in STREAMS:
        near = difflib.get_close_matches(scheme, STREAMS, n=1)
        hint = f"Did you mean {near[0]}://{rest}?" if near else f"Known: {', '.join(f'{s}://' for s in STREAMS)}."
        raise DataError(f"unknown kind of source {entry!r}. {hint}", entry=entry)
    if scheme == "builtin" and rest != "python-docs":
        raise DataError(f"there is no built-in corpus {rest!r}; there is builtin://python-docs.", entry=entry)
    if scheme == "hub":
        _hub_arguments(entry)
    return Source(entry)


def local_path(text: str | Path) -> Path:
    """The path that a user wrote, with ``~`` resolved; there need not be anything.

    Raises:
        DataError: no file system can have it.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{shortened(str(text))} is no path: {reason(error)}", path=str(text)) from None
    return path


def _matching_files(entry: str) -> list[Path]:
    path = local_path(entry)
    matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files: list[Path] = []
    for match in matches:
        if match.is_dir():
            found = sorted(p for p in match.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(match)))
            # A folder may hold anything; a file that was named must be understood.
            files += [p for p in found if _format(p) in READERS]
        elif match.is_file():
            if _format(match) not in READERS:
                known = ", ".join(READERS)
                raise DataError(
                    f"{match} has the unknown format {_format(match)!r}. Known: {known}, and .gz of each but .parquet.",
                    path=str(match),
                )
            files.append(match)
    if not files:
        unset = entry.startswith("data/") and "STEPLM_DATA" not in os.environ
        hint = " STEPLM_DATA, the folder in which shipped recipes look, is not set." if unset else ""
        raise DataError(f"no text found at {entry!r}. {_what_is_there(path)}{hint}", entry=entry)
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        # A Parquet file needs random access, which gzip does not give.
        return ".gz" if suffixes[-1:] == [".parquet"] or not suffixes else suffixes[-1]
    return suffixes[-1] if suffixes else ""


def _what_is_there(path: Path) -> str:
    folder = next(p for p in (path, *path.parents) if p.is_dir())
    names = sorted(p.name for p in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3) or names[:5]
    if not names:
        return f"The folder {folder} is empty."
    return f"The folder {folder} holds {', '.join(near)}{', ...' if len(names) > len(near) else ''}."


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", path=str(path)) from None


def _usable(name: str, records: Iterator[Record], text_field: str, bad: BadRecords) -> Iterator[Document]:
    for place, value in records:
        text = value.get(text_field) if isinstance(value, dict) else value
        reason = _why_unusable(value, text, text_field)
        if reason:
            bad.add(f"{name}:{place}", reason)
        else:
            bad.num_records += 1
            yield Document(str(text), f"{name}:{place}")


def _why_unusable(value: Any, text: Any, text_field: str) -> str | None:
    if isinstance(value, Exception):
        return str(value)
    if text is None:
        return f"no field {text_field!r}; fields are {_listed(value)}" if value else "an empty record"
    if not isinstance(text, str):
        what = f"field {text_field!r}" if isinstance(value, dict) else "the record"
        return f"{what} is {type(text).__name__}, not text"
    if not text.strip():
        return f"field {text_field!r} is empty" if isinstance(value, dict) else "no text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text that is not Unicode: a lone surrogate at character {error.start}"
    return None


def _listed(names: Iterable[str], most: int = 10) -> str:
    first = [shortened(name, 40) for name in islice(names, most + 1)]
    return ", ".join([*first[:most], *(["..."] if len(first) > most else [])])


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, 1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parse_json(data: bytes) -> Any:
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"broken JSON: {error}")
    return value


def _as_record(value: Any) -> Any:
    if isinstance(value, dict | Exception):
        return value
    return ValueError(f"a JSON {type(value).__name__}, not an object with fields")


def _read_json_lines(stream: BinaryIO, field: str | None) -> Iterator[Record]:
    for number, line in _lines(stream):
        if line.strip():
            yield number, _as_record(_parse_json(line))


def _read_json(stream: BinaryIO, field: str | None) -> Iterator[Record]:
    """A list of objects, one object, or, as many data sets have it under this name, an object per line."""
    lines = _lines(stream)
    number, first = next(((n, line) for n, line in lines if line.strip()), (0, b""))
    if not first:
        return
    if not first.lstrip().startswith(b"[") and first.strip() != b"{":
        yield number, _as_record(_parse_json(first))
        for number, line in lines:
            if line.strip():
                yield number, _as_record(_parse_json(line))
        return
    value = _parse_json(first + b"".join(line for _, line in lines))
    for place, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield place, _as_record(record)


def _read_text(stream: BinaryIO, field: str | None) -> Iterator[Record]:
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


def _decode(data: bytes) -> str | ValueError:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: {error.reason} at byte {error.start}")


def _read_parquet(stream: BinaryIO, field: str | None) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(stream)
        columns = table.schema_arrow.names
        if field is not None and field not in columns:
            yield 1, ValueError(f"no column {field!r}; columns are {_listed(columns)}")
            return
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=None if field is None else [field]):
            for record in batch.to_pylist():
                row += 1
                yield row, record
    except pyarrow.ArrowException as error:
        yield 1, ValueError(f"damaged Parquet: {error}")


def _hub_arguments(entry: str) -> tuple[str, dict[str, str]]:
    try:
        parts = urlsplit(entry)
    except ValueError as error:
        raise DataError(f"{entry!r} is no address of a data set: {error}", entry=entry) from None
    keys = dict(parse_qsl(parts.query))
    for key in keys:
        if key not in HUB_KEYS:
            raise DataError(f"{entry!r} has the unknown key {key!r}.{nearest(key, HUB_KEYS)}", entry=entry)
    return f"{parts.netloc}{parts.path}".rstrip("/"), {"split": "train", **keys}


def _stream_hub(entry: str) -> Iterator[Record]:
    """The records of a data set on the hub, over the network.

    A stream that breaks off is opened again a few times, after the records that were read. A preparation that
    is started again reads the stream from its beginning, so pin what may change: ``&revision=COMMIT`` is a
    part of the inputs by which prepared folders are told apart.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, arguments = _hub_arguments(entry)
    row = num_failures = 0
    while True:
        try:
            stream = load_dataset(name, streaming=True, **arguments)
            for record in stream.skip(row) if row else stream:
                row += 1
                num_failures = 0
                yield row, record
            return
        except (DatasetsError, ValueError) as error:  # no such data set, configuration or split
            raise DataError(f"cannot read {entry}: {error}", entry=entry) from None
        except Exception as error:
            if not _is_connection_error(error):
                raise
            # Where not even one record came, there is no network, or no such name: no reason to wait.
            if row == 0 or num_failures == len(HUB_RETRY_SECONDS):
                raise HubUnavailable(
                    f"the hub cannot be reached for {entry} (after {row:,} records): {error}\n"
                    "Start again when it can (finished shards are kept), or name local files in data.train.",
                    entry=entry,
                    num_records=row,
                ) from None
        time.sleep(HUB_RETRY_SECONDS[num_failures])
        num_failures += 1


def _is_connection_error(error: BaseException | None) -> bool:
    """Three libraries lie between us and the socket, each with its own name for a lost connection."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
            "httpx",
            "aiohttp",
            "requests",
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _stream_builtin(entry: str) -> Iterator[Record]:
    yield from enumerate(python_docs(), 1)


READERS: dict[str, Callable[[BinaryIO, str | None], Iterator[Record]]] = {
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

STREAMS: dict[str, Callable[[str], Iterator[Record]]] = {"hub": _stream_hub, "builtin": _stream_builtin}
