"""Text sources: files, folders, the hub and the built-in corpus, as one stream of documents.

Unusable records are counted in ``BadRecords`` and skipped; the caller decides whether there are too many
(``BadRecords.check``).
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from steplm.data.builtin import describe_python_docs, python_docs
from steplm.data.formats import Fields, Place, Record, is_readable, known_formats, listed, read_records, split_format
from steplm.errors import DataError, HubUnavailable
from steplm.files import is_unicode
from steplm.units import nearest, reason, shortened

NUM_EXAMPLES = 10
DIGESTED_BYTES = 2**16  # at each end of a file
HOPELESS_RECORDS = 1000  # stop reading if this many records come first and all are unusable
HUB_RETRY_SECONDS = (1, 5, 25, 125)  # waits before reconnecting a broken stream
COMMIT = re.compile("[0-9a-f]{40}")
SCHEMES = ("hub", "builtin")
HTTP_LIBRARIES = ("httpx", "aiohttp", "requests")
HUB_KEYS = ("name", "split", "revision", "data_dir", "data_files")


@dataclass(frozen=True)
class Document:
    text: str
    origin: str  # "FILE:LINE"
    place: Place = field(default=0, compare=False)  # position in its source


@dataclass(frozen=True)
class BadRecord:
    """A reason why records are unusable, the number of such records, and the place of the first."""

    origin: str
    reason: str
    count: int = 1


@dataclass
class BadRecords:
    """The number of records read, the number of unusable ones, and the first few reasons."""

    num_records: int = 0
    num_bad: int = 0
    examples: list[BadRecord] = field(default_factory=list)
    max_bad_share: float = 1.0

    @property
    def share(self) -> float:
        return self.num_bad / max(self.num_records, 1)

    def add(self, origin: str, reason: str) -> None:
        self.num_records += 1
        self.num_bad += 1
        for index, example in enumerate(self.examples):
            if example.reason == reason:
                self.examples[index] = replace(example, count=example.count + 1)
                break
        else:
            if len(self.examples) < NUM_EXAMPLES:
                self.examples.append(BadRecord(origin, reason))
        if self.num_bad == self.num_records == HOPELESS_RECORDS:
            self.check()

    def check(self) -> None:
        """Raise ``DataError``, with the first reasons, if more than ``max_bad_share`` of the records are bad."""
        if self.num_bad and self.share > self.max_bad_share:
            lines = [
                f"  {bad.origin}: {bad.reason}{f' (and {bad.count - 1:,} more like it)' if bad.count > 1 else ''}"
                for bad in self.examples
            ]
            if not_listed := self.num_bad - sum(bad.count for bad in self.examples):
                lines.append(f"  and {not_listed:,} more for other reasons")
            examples = "\n".join(lines)
            raise DataError(
                f"{self.num_bad:,} of {self.num_records:,} records ({self.share:.2%}) are unusable, "
                f"more than data.max_bad_share={self.max_bad_share}:\n{examples}\n"
                "Fix the files, name the right data.text_field, or raise data.max_bad_share.",
                num_bad=self.num_bad,
                num_records=self.num_records,
                max_bad_share=self.max_bad_share,
            )


@dataclass(frozen=True)
class Source:
    """One file, one hub data set, or the built-in corpus."""

    name: str
    path: Path | None = None
    revision: str | None = None  # commit of a hub data set; overrides one in its name

    def describe(self) -> str:
        """A description that changes with the content, as far as the size and both ends of the file show.

        The folder and modification time do not matter: a copied or moved file is the same text.
        """
        if self.path is not None:
            return f"{_printable(self.path.name)} ({self.path.stat().st_size} bytes, ends {_digest_of_ends(self.path)})"
        return self.name if self.is_on_hub else describe_python_docs()

    @property
    def is_on_hub(self) -> bool:
        return self.path is None and self.name.startswith("hub://")

    @property
    def is_pinned(self) -> bool:
        """Whether ``describe`` identifies the text; text on the hub can change unless a commit is given."""
        return not self.is_on_hub or bool(COMMIT.fullmatch(_hub_arguments(self.name)[1].get("revision", "")))

    def pinned(self) -> Source:
        """Pin an unpinned hub data set to its current commit, if the hub is reachable."""
        if self.is_pinned:
            return self
        from huggingface_hub import HfApi

        name, arguments = _hub_arguments(self.name)
        try:
            commit = HfApi().dataset_info(name, revision=arguments.get("revision"), timeout=10).sha
        except Exception:  # no network or no such data set: reading it will raise
            return self
        return replace(self, revision=commit)

    def documents(self, text_field: str, bad: BadRecords, after: Place | None = None) -> Iterator[Document]:
        """Yield the documents in order; unusable records are counted in ``bad``.

        Args:
            after: yield only documents after this place.

        Raises:
            DataError: the source cannot be read at all.
        """
        yield from _usable(self.name, self.records([text_field], after), text_field, bad)

    def records(self, fields: Fields = None, after: Place | None = None) -> Iterator[Record]:
        """Yield each record with its place; the value of an unreadable record is an exception that says why.

        Args:
            after: as for ``documents``. A file is read from the start, the hub from the shard of the place.
            fields: fields to read; default: all. Columnar formats skip the others, so that their contents cannot cause
                an error.

        Raises:
            DataError: the source cannot be read at all.
        """
        if self.is_on_hub:
            yield from _stream_hub(self.name, self.revision, after)
            return
        records: Iterable[Record] = enumerate(python_docs(), 1) if self.path is None else self._of_file(fields)
        yield from (record for record in records if after is None or record[0] > after)

    def _of_file(self, fields: Fields) -> Iterator[Record]:
        assert self.path is not None
        with errors_of(self.path), self.path.open("rb") as stream:
            yield from read_records(stream, self.path, fields)


def _digest_of_ends(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(DIGESTED_BYTES))
        stream.seek(max(path.stat().st_size - DIGESTED_BYTES, 0))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


def find_sources(entries: Sequence[str], skipped: list[Path] | None = None) -> list[Source]:
    """Find the sources that the entries name, in order and without repeats; files of a folder or glob sorted by name.

    Args:
        skipped: files in folders whose format is unknown are added to this list.

    Raises:
        DataError: an entry matches nothing or has an unknown format.
    """
    sources: list[Source] = []
    for entry in entries:
        if "://" in entry:
            sources.append(_remote(entry))
        else:
            sources += [Source(_printable(path), path) for path in _matching_files(entry, skipped)]
    return list(dict.fromkeys(sources))


def _printable(path: Path | str) -> str:
    """A name that can be printed anywhere; bytes that are not UTF-8 are escaped, as ``\\xe9``."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _remote(entry: str) -> Source:
    scheme, _, rest = entry.partition("://")
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1)
        hint = f"Did you mean {near[0]}://{rest}?" if near else f"Known: {', '.join(f'{s}://' for s in SCHEMES)}."
        raise DataError(f"unknown kind of source {entry!r}. {hint}", entry=entry)
    if scheme == "builtin" and rest != "python-docs":
        raise DataError(f"there is no built-in corpus {rest!r}; there is builtin://python-docs.", entry=entry)
    if scheme == "hub":
        _hub_arguments(entry)
    return Source(entry)


def local_path(text: str | Path) -> Path:
    """The path that a user wrote, with ``~`` expanded; it need not exist.

    Raises:
        DataError: it is not a valid path.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{shortened(str(text))} is not a path: {reason(error)}", path=str(text)) from None
    return path


def _matching_files(entry: str, skipped: list[Path] | None) -> list[Path]:
    path = local_path(entry)
    matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files: list[Path] = []
    for match in matches:
        if match.is_dir():
            found = _files_of_folder(match)
            # Unknown formats are skipped in a folder, but are an error for a file named explicitly.
            files += filter(is_readable, found)
            if skipped is not None:
                skipped += [file for file in found if not is_readable(file)]
        elif match.is_file():
            if not is_readable(match):
                unknown = split_format(match)[0]
                raise DataError(f"{match} has the unknown format {unknown!r}. {known_formats()}", path=str(match))
            files.append(match)
    if not files:
        unset = entry.startswith("data/") and "STEPLM_DATA" not in os.environ
        hint = " STEPLM_DATA, the folder in which shipped recipes look, is not set." if unset else ""
        raise DataError(f"no text found at {entry!r}. {_what_is_there(path)}{hint}", entry=entry)
    return files


def _files_of_folder(folder: Path) -> list[Path]:
    """The files of a folder, sorted by name, without hidden files and the metadata that ``datasets`` writes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(folder)))
    for file in files:
        if file.name == "dataset_dict.json":
            splits = ", ".join(sorted(p.name for p in file.parent.iterdir() if p.is_dir()))
            raise DataError(
                f"{file.parent} holds several splits of a data set: {splits}. Name one, as {file.parent}/SPLIT.",
                path=str(file.parent),
            )
    saved_sets = {file.parent for file in files if file.suffix == ".arrow"}
    return [p for p in files if p.parent not in saved_sets or p.name not in ("dataset_info.json", "state.json")]


def describe_skipped(files: Sequence[Path]) -> str:
    """A note such as ``"2 files of unknown format are not read: a.pdf, b.png"``."""
    names = ", ".join([*(_printable(file.name) for file in files[:5]), *(["..."] if len(files) > 5 else [])])
    what = f"{len(files):,} files of unknown format are" if len(files) > 1 else "a file of unknown format is"
    return f"{what} not read: {names}"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _what_is_there(path: Path) -> str:
    folder = next(p for p in (path, *path.parents) if p.is_dir())
    names = sorted(p.name for p in folder.iterdir())
    if not names:
        return f"The folder {folder} is empty."
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"Did you mean {str(folder / near[0])!r}?"
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"The folder {folder} holds {', '.join(names[:5])}{more}."


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", path=str(path)) from None


def _usable(name: str, records: Iterator[Record], text_field: str, bad: BadRecords) -> Iterator[Document]:
    for place, value in records:
        try:
            document = Document(_text_of(value, text_field), f"{name}:{place}", place)
        except ValueError as error:
            bad.add(f"{name}:{place}", str(error))
        else:
            bad.num_records += 1
            yield document


def _text_of(value: Any, text_field: str) -> str:
    """The text of a record; raises ``ValueError`` if it has none."""
    if isinstance(value, Exception):
        raise ValueError(str(value))
    is_text = isinstance(value, str)  # as in a text file
    if not is_text and text_field not in value:
        raise ValueError(f"no field {text_field!r}; fields are {listed(value)}" if value else "an empty record")
    text = value if is_text else value[text_field]
    if text is None:
        raise ValueError(f"field {text_field!r} is null")
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not text")
    if not text.strip():
        raise ValueError("no text" if is_text else f"field {text_field!r} is empty")
    if not is_unicode(text):
        raise ValueError("text that is not Unicode: a lone surrogate")
    return text


def _hub_arguments(entry: str) -> tuple[str, dict[str, str]]:
    try:
        parts = urlsplit(entry)
    except ValueError as error:
        raise DataError(f"{entry!r} is not the address of a data set: {error}", entry=entry) from None
    keys = dict(parse_qsl(parts.query))
    for key in keys:
        if key not in HUB_KEYS:
            raise DataError(f"{entry!r} has the unknown key {key!r}.{nearest(key, HUB_KEYS)}", entry=entry)
    return f"{parts.netloc}{parts.path}".rstrip("/"), {"split": "train", **keys}


def _stream_hub(entry: str, revision: str | None, after: Place | None) -> Iterator[Record]:
    """Stream the records of a hub data set; in one with several shards, places are ``SHARD:ROW``.

    A broken stream is reopened a few times, after the last record read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, arguments = _hub_arguments(entry)
    if revision is not None:
        arguments["revision"] = revision
    shard, row = map(int, after.split(":")) if isinstance(after, str) else (0, int(after or 0))
    num_read = num_failures = 0
    while True:
        try:
            stream = load_dataset(name, streaming=True, **arguments)
            num_shards = getattr(stream, "num_shards", 1)
            while shard < num_shards:
                part = stream.shard(num_shards=num_shards, index=shard) if num_shards > 1 else stream
                for record in part.skip(row) if row else part:
                    row += 1
                    num_read += 1
                    num_failures = 0
                    yield (row if num_shards == 1 else f"{shard}:{row}"), record
                shard, row = shard + 1, 0
            return
        except (DatasetsError, ValueError) as error:  # no such data set, configuration or split
            raise DataError(f"cannot read {entry}: {error}", entry=entry) from None
        except Exception as error:
            if not _is_connection_error(error):
                raise
            # If not even one record came, there is no network or no such data set: retrying is pointless.
            if num_read == 0 or num_failures == len(HUB_RETRY_SECONDS):
                raise HubUnavailable(
                    f"the hub cannot be reached for {entry} (after {num_read:,} records): {error}\n"
                    "Start again when it can (it resumes where it stopped), or name local files in data.train.",
                    entry=entry,
                    num_records=num_read,
                ) from None
        time.sleep(HUB_RETRY_SECONDS[num_failures])
        num_failures += 1


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether a connection was lost, for which each HTTP library under ``datasets`` has its own exceptions."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in HTTP_LIBRARIES:
            return True
        error = error.__cause__ or error.__context__
    return False
