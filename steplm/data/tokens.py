"""Read prepared tokens: the manifest, and a memory map over the shards of a split.

PREPARED/inputs.json                      what the shards are made from; written first
PREPARED/tokenizer/                       a Hugging Face folder
PREPARED/train/shard-00000.bin            tokens, little-endian uint16 or uint32; each document ends with end of text
PREPARED/train/shard-00000.offsets.npy    int64, the start of each document, and the end of the last
PREPARED/train/shard-00000.json           counts and hashes of the two files above; written after them. It may refer
                                          to another program's token file instead of the .bin file
PREPARED/validation/...                   train/NAME/... for a mixture, validation/NAME/... for several sets
PREPARED/manifest.json                    the full manifest; written last, so its presence means the work is finished
PREPARED/unfinished.json                  progress of unfinished work, with the hashes of seen documents in
                                          documents.hashes
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from steplm.data.sources import BadRecord
from steplm.errors import DataError
from steplm.files import file_sha256
from steplm.types import from_json
from steplm.units import reason, shortened

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Shard:
    name: Annotated[str, Field(pattern=r"^shard-\d{5,}$")]  # "shard-00000"
    num_tokens: Annotated[int, Field(gt=0)]
    num_documents: Annotated[int, Field(gt=0)]
    num_text_bytes: Count  # UTF-8
    last_document: Count  # index in the stream of distinct documents, from 0
    tokens_sha256: str
    offsets_sha256: str
    tokens_file: str | None = None  # another program's token file; None: NAME.bin beside the offsets
    header_bytes: Count = 0  # header size of that file
    documents_by_length: tuple[Count, ...] = ()  # see the function below; empty if an earlier version wrote the shard

    def tokens_path(self, folder: Path) -> Path:
        return folder / f"{self.name}.bin" if self.tokens_file is None else Path(self.tokens_file)

    def offsets_path(self, folder: Path) -> Path:
        return folder / f"{self.name}.offsets.npy"

    def file_bytes(self, itemsize: int) -> int:
        """Size of the token file."""
        return self.header_bytes + self.num_tokens * itemsize


def documents_by_length(offsets: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Number of documents of 1, 2 to 3, 4 to 7, ... tokens, including end of text.

    Args:
        offsets: (num_documents + 1,): the start of each document, and the end of the last.
    """
    return tuple(np.bincount(np.frexp(np.diff(offsets))[1] - 1).tolist())


def _total(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(*parts, fillvalue=0))) if all(parts) else ()


@dataclass(frozen=True)
class SplitManifest:
    shards: tuple[Shard, ...]

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_text_bytes(self) -> int:
        return sum(shard.num_text_bytes for shard in self.shards)

    @property
    def documents_by_length(self) -> tuple[int, ...]:
        """See the function of this name; empty if a shard does not say it."""
        return _total([shard.documents_by_length for shard in self.shards])


@dataclass(frozen=True)
class TokenizerManifest:
    name: str  # data.tokenizer as the user wrote it
    vocab_size: Annotated[int, Field(gt=0)]
    eos_token_id: Count
    sha256: str  # of tokenizer/tokenizer.json


@dataclass(frozen=True)
class Manifest:
    """The contents of a prepared folder, and what it was made from."""

    fingerprint: str  # of inputs.json
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerManifest
    splits: dict[str, SplitManifest]  # "train" and "validation"; "train/NAME", ... for a mixture or several sets
    num_records: Count
    num_bad_records: Count
    num_duplicates: Count  # exact duplicates that were dropped
    bad_records: tuple[BadRecord, ...]  # the first few
    schema_version: int = SCHEMA_VERSION

    def split(self, name: str) -> SplitManifest:
        if name not in self.splits:
            raise DataError(f"there is no split {name!r}. There are: {', '.join(self.splits)}.", split=name)
        return self.splits[name]

    def splits_of(self, kind: str) -> dict[str, str]:
        """The splits of ``train`` or ``validation`` by set name; a single unnamed set gives ``{"train": "train"}``."""
        return {name.partition("/")[2] or kind: name for name in self.splits if name.partition("/")[0] == kind}

    @property
    def training_documents_by_length(self) -> tuple[int, ...]:
        """``documents_by_length`` of all training splits; empty if an earlier version wrote one of them."""
        return _total([self.splits[split].documents_by_length for split in self.splits_of("train").values()])

    @classmethod
    def load(cls, prepared_dir: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            DataError: it is missing (preparation not started or not finished), damaged, or from another version.
        """
        path = Path(prepared_dir) / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{prepared_dir} holds no finished token shards ({MANIFEST} is missing). "
                "Run 'steplm prepare'; it resumes where it was interrupted.",
                path=str(path),
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.get("schema_version")
            manifest = from_json(cls, values) if version == SCHEMA_VERSION else None
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged: {reason(error)}. {_start_over(prepared_dir)}", path=str(path)
            ) from None
        if manifest is None:
            raise DataError(
                f"{path} has version {shortened(version)}, this steplm reads {SCHEMA_VERSION}. "
                f"{_start_over(prepared_dir)}",
                path=str(path),
                version=version,
            )
        return manifest


class TokenDataset:
    """The tokens of one split, as one long sequence of documents, each ending with the end-of-text token.

    Opening compares file sizes with the manifest and reads no tokens. Pickling keeps only the path; each process
    maps the files itself.

    Raises:
        DataError: the data is not prepared, or a shard is missing or has the wrong size.
    """

    def __init__(self, prepared_dir: Path | str, split: str) -> None:
        self.prepared_dir = Path(prepared_dir)
        self.split = split
        self.manifest = Manifest.load(self.prepared_dir)
        self.shards = self.manifest.split(split).shards
        check_sizes(self.prepared_dir, self.manifest, split)
        # Each shard is mapped on first read: a run may need only a few of thousands.
        self._mapped_tokens: dict[int, npt.NDArray[np.unsignedinteger]] = {}
        self._mapped_offsets: dict[int, npt.NDArray[np.int64]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, (self.prepared_dir, self.split)

    @property
    def num_tokens(self) -> int:
        return int(self._shard_starts[-1])

    @property
    def num_documents(self) -> int:
        return self.manifest.split(self.split).num_documents

    @property
    def num_text_bytes(self) -> int:
        """UTF-8 bytes of the documents' text, for bits per byte."""
        return self.manifest.split(self.split).num_text_bytes

    @cached_property
    def document_offsets(self) -> npt.NDArray[np.int64]:
        """(num_documents + 1,): the start of each document; the last entry is ``num_tokens``."""
        return np.concatenate([np.zeros(1, np.int64), *(offsets[1:] for offsets in self.offsets_of_shards())])

    def offsets_of_shards(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield for each shard the starts of its documents, and the end of the last."""
        for index, start in enumerate(self._shard_starts[:-1]):
            yield start + self._offsets(index)

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Document starts from ``start`` to ``stop`` (exclusive), as positions in the split."""
        parts = [np.empty(0, np.int64)]
        for index in self._shards_of(start, stop):
            begin = int(self._shard_starts[index])
            offsets = self._offsets(index)
            first, last = np.searchsorted(offsets[:-1], (start - begin, stop - begin))
            parts.append(begin + offsets[first:last])
        return np.concatenate(parts)

    @property
    def document_lengths(self) -> npt.NDArray[np.int64]:
        """(num_documents,): tokens in each document, including its end-of-text token."""
        return np.diff(self.document_offsets)

    def read(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """Tokens ``start`` to ``stop`` (exclusive); a view if they are all in one shard."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        parts = []
        for index in self._shards_of(start, stop):
            begin = int(self._shard_starts[index])
            parts.append(self._tokens(index)[max(start - begin, 0) : stop - begin])
        if not parts:
            return np.empty(0, _dtype(self.manifest))
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # On a device, the error for an out-of-range token ID would not say where it comes from.
        if (largest := int(tokens.max())) >= self.manifest.tokenizer.vocab_size:
            raise DataError(
                f"{self.prepared_dir / self.split} has the token {largest:,}, and the tokenizer has "
                f"{self.manifest.tokenizer.vocab_size:,}: a shard is damaged. {_start_over(self.prepared_dir)}",
                token=largest,
                vocab_size=self.manifest.tokenizer.vocab_size,
            )
        return tokens

    def document(self, index: int) -> npt.NDArray[np.unsignedinteger]:
        """The tokens of one document, including its end-of-text token."""
        return self.read(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    @cached_property
    def _shard_starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(shard.num_tokens for shard in self.shards)], dtype=np.int64)

    def _shards_of(self, start: int, stop: int) -> range:
        """Indices of the shards that contain tokens ``start`` to ``stop`` (exclusive)."""
        first, last = np.searchsorted(self._shard_starts, (start, stop - 1), side="right")
        return range(int(first) - 1, int(last) if stop > start else 0)

    def _tokens(self, index: int) -> npt.NDArray[np.unsignedinteger]:
        if index not in self._mapped_tokens:
            shard = self.shards[index]
            path = shard.tokens_path(self.prepared_dir / self.split)
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Windows are read in random order; readahead would fetch up to 128 KiB of unused data around each.
            mapped.madvise(mmap.MADV_RANDOM)
            self._mapped_tokens[index] = np.frombuffer(
                mapped, _dtype(self.manifest), shard.num_tokens, shard.header_bytes
            )
        return self._mapped_tokens[index]

    def _offsets(self, index: int) -> npt.NDArray[np.int64]:
        if index not in self._mapped_offsets:
            self._mapped_offsets[index] = _load_offsets(self.prepared_dir, self.split, self.shards[index])
        return self._mapped_offsets[index]


def check_sizes(prepared_dir: Path, manifest: Manifest, *splits: str) -> None:
    """Check that every shard file exists and has the size given in the manifest.

    Raises:
        DataError: a file is missing or has another size.
    """
    for path, num_bytes, _ in _files(prepared_dir, manifest, splits):
        if not path.is_file():
            raise DataError(f"the shard {path} is missing. {_start_over(prepared_dir)}", path=str(path))
        if path.stat().st_size != num_bytes:
            raise DataError(
                f"the shard {path} has {path.stat().st_size:,} bytes, the manifest says {num_bytes:,}. "
                f"{_start_over(prepared_dir)}",
                path=str(path),
                num_bytes=path.stat().st_size,
                expected_bytes=num_bytes,
            )


def verify(prepared_dir: Path | str) -> Manifest:
    """Read every file and compare it with its hash.

    Raises:
        DataError: a file is missing or has changed since it was written.
    """
    folder = Path(prepared_dir)
    manifest = Manifest.load(folder)
    check_sizes(folder, manifest)
    for path, _, sha256 in _files(folder, manifest):
        if file_sha256(path) != sha256:
            raise DataError(f"{path} is not what was written: its hash differs. {_start_over(folder)}", path=str(path))
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer.sha256:
        raise DataError(
            f"{tokenizer} is missing or is not the one that made the tokens. {_start_over(folder)}",
            path=str(tokenizer),
        )
    return manifest


def offsets_file_bytes(num_documents: int) -> int:
    """Size of the ``.npy`` file: a 128-byte header and ``num_documents + 1`` entries of 8 bytes."""
    return 128 + 8 * (num_documents + 1)


def _files(prepared_dir: Path, manifest: Manifest, splits: Sequence[str] = ()) -> Iterator[tuple[Path, int, str]]:
    """Yield the path, size and sha256 of every file of these splits; default: of all."""
    itemsize = _dtype(manifest).itemsize
    for split in splits or manifest.splits:
        for shard in manifest.split(split).shards:
            folder = prepared_dir / split
            yield shard.tokens_path(folder), shard.file_bytes(itemsize), shard.tokens_sha256
            yield shard.offsets_path(folder), offsets_file_bytes(shard.num_documents), shard.offsets_sha256


def _load_offsets(prepared_dir: Path, split: str, shard: Shard) -> npt.NDArray[np.int64]:
    path = shard.offsets_path(prepared_dir / split)
    try:
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is a Python literal: if damaged, the parser can raise anything
        raise DataError(f"{path} is damaged: {reason(error)}. {_start_over(prepared_dir)}", path=str(path)) from None
    is_whole = offsets.dtype == np.dtype("<i8") and offsets.shape == (shard.num_documents + 1,)
    if not is_whole or offsets[0] != 0 or offsets[-1] != shard.num_tokens or np.any(np.diff(offsets) < 1):
        raise DataError(
            f"{path} is damaged: not the rising starts of {shard.num_documents:,} documents of {shard.num_tokens:,} "
            f"tokens. {_start_over(prepared_dir)}",
            path=str(path),
        )
    return offsets


def _dtype(manifest: Manifest) -> np.dtype[Any]:
    return np.dtype(manifest.dtype).newbyteorder("<")


def _start_over(prepared_dir: Path) -> str:
    return f"Remove {prepared_dir} and run 'steplm prepare' again."
