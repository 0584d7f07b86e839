"""Token files prepared by other programs (nanoGPT, llm.c, Megatron), used in place.

    nanoGPT    NAME.bin              uint16, nothing else
    llm.c      NAME.bin              a header of 1,024 bytes, then uint16 (GPT-2) or uint32 (Llama 3)
    Megatron   NAME.bin, NAME.idx    the tokens, and their type and number

In all of them, the end-of-text token separates documents. Most files have it after each document, llm.c's before;
here a document starts after each end-of-text token.
"""

from __future__ import annotations

import glob
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from steplm.data.shards import ShardWriter
from steplm.data.sources import Source, errors_of, local_path
from steplm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SUFFIX = ".bin"
LLM_C_HEADER_BYTES = 1024
LLM_C_KINDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic number and version
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
TOKENS_AT_ONCE = 2**24


@dataclass(frozen=True)
class TokenFile:
    path: Path
    dtype: str  # numpy name
    num_tokens: int
    header_bytes: int = 0

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def describe(self) -> str:
        return Source(str(self.path), self.path).describe()

    def read(self) -> npt.NDArray[np.integer]:
        with errors_of(self.path):
            return np.memmap(self.path, self.dtype, "r", self.header_bytes, (self.num_tokens,))


def names_tokens(entry: str) -> bool:
    return "://" not in entry and entry.lower().endswith(SUFFIX)


def find_token_files(entries: Sequence[str]) -> list[TokenFile]:
    """Find the files that the entries (paths or globs) name, in order and without repeats.

    Raises:
        DataError: an entry matches nothing, or a file has none of the formats above.
    """
    paths: list[Path] = []
    for entry in entries:
        path = local_path(entry)
        found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise DataError(f"no token file found at {entry!r}.", entry=entry)
        paths += found
    return [open_token_file(path) for path in dict.fromkeys(paths)]


def open_token_file(path: Path) -> TokenFile:
    """Determine a file's format from its header or index, without reading its tokens."""
    with errors_of(path):
        num_bytes = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(12)
        index = path.with_suffix(".idx")
        if index.is_file():
            return _megatron(path, index, num_bytes)
    if len(header) == 12:
        magic, version, num_tokens = struct.unpack("<3i", header)
        if dtype := LLM_C_KINDS.get((magic, version)):
            return _whole(TokenFile(path, dtype, num_tokens, LLM_C_HEADER_BYTES), num_bytes)
    return _whole(TokenFile(path, "<u2", num_bytes // 2), num_bytes)


def _megatron(path: Path, index: Path, num_bytes: int) -> TokenFile:
    data = index.read_bytes()
    if len(data) < 34 or not data.startswith(MEGATRON_MAGIC):
        raise DataError(f"{index} is not a Megatron index: {path} cannot be read by it.", path=str(index))
    version, code, num_sequences, _ = struct.unpack("<QBQQ", data[9:34])
    if version != 1 or code not in MEGATRON_TYPES or len(data) < 34 + 4 * num_sequences:
        raise DataError(f"{index} is damaged, or of another version: version {version}, type {code}.", path=str(index))
    lengths = np.frombuffer(data, "<i4", num_sequences, 34)
    return _whole(TokenFile(path, MEGATRON_TYPES[code], int(lengths.sum(dtype=np.int64))), num_bytes)


def _whole(file: TokenFile, num_bytes: int) -> TokenFile:
    expected = file.header_bytes + file.num_tokens * file.itemsize
    if num_bytes != expected or file.num_tokens < 1:
        raise DataError(
            f"{file.path} has {num_bytes:,} bytes, and {file.num_tokens:,} tokens of {file.itemsize} bytes "
            f"with a header of {file.header_bytes:,} have {expected:,}: it is cut short or not a token file.",
            path=str(file.path),
            num_bytes=num_bytes,
        )
    return file


def take_over(
    files: Sequence[TokenFile],
    writer: ShardWriter,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    *,
    count_text: bool,
) -> None:
    """Add the files to ``writer`` as shards, after those it already has from an interrupted call.

    A file with the writer's token width stays in place, and only its document offsets are written. Files of another
    width are copied.

    Args:
        vocab_size: every token must be below it.
        count_text: decode the documents for ``num_text_bytes``, which is 0 otherwise.

    Raises:
        DataError: a token is outside the vocabulary, or a file has no end-of-text token: another tokenizer made it.
    """

    def text_bytes(document: npt.NDArray[np.integer]) -> int:
        backend = tokenizer.backend_tokenizer
        return len(backend.decode(document.tolist(), skip_special_tokens=True).encode()) if count_text else 0

    position = 0  # index of the file's first document among those of all files
    for file in files:
        offsets, sha256 = _scan(file, cast(int, tokenizer.eos_token_id), vocab_size)
        last = position + len(offsets) - 2
        if last > writer.last_document and file.itemsize == writer.dtype.itemsize:
            documents = np.split(file.read(), offsets[1:-1]) if count_text else []
            num_bytes = sum(map(text_bytes, documents))
            writer.add_file(file.path, file.header_bytes, offsets, sha256, num_bytes, last)
        elif last > writer.last_document:
            for number, document in enumerate(np.split(file.read(), offsets[1:-1]), position):
                if number > writer.last_document:
                    writer.append(number, document.astype(writer.dtype), text_bytes(document))
        position = last + 1
    writer.close()


def _scan(file: TokenFile, end_of_text: int, vocab_size: int) -> tuple[npt.NDArray[np.int64], str]:
    """Return the document offsets (num_documents + 1,) and the hash of the file's bytes."""
    tokens = file.read()
    with errors_of(file.path), file.path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(file.header_bytes))
    ends = []
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        part = np.asarray(tokens[start : start + TOKENS_AT_ONCE])
        digest.update(part.tobytes())
        smallest, largest = int(part.min()), int(part.max())
        if smallest < 0 or largest >= vocab_size:
            raise DataError(
                f"{file.path} has the token {largest if smallest >= 0 else smallest:,}, and the tokenizer has "
                f"{vocab_size:,}: set data.tokenizer to the one that made the file.",
                path=str(file.path),
                vocab_size=vocab_size,
            )
        ends.append(np.flatnonzero(part == end_of_text) + start + 1)
    inner = np.concatenate(ends)
    if not len(inner):
        raise DataError(
            f"{file.path} has no token {end_of_text}, the end of text of data.tokenizer: set data.tokenizer to the one "
            "that made the file, or make the file with an end of text after each document (--append-eod of Megatron).",
            path=str(file.path),
            end_of_text=end_of_text,
        )
    return np.concatenate([[0], inner[inner < len(tokens)], [len(tokens)]]).astype(np.int64), digest.hexdigest()
