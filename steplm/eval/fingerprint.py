"""Of what a saved result is: hashes of models and of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from steplm.data.sources import find_sources
from steplm.data.tokenizer import load_tokenizer, tokenizer_files
from steplm.data.tokens import file_sha256
from steplm.models.folder import load_hf_config, weight_files


def model_fingerprint(model: str) -> str:
    """A hash of a folder's configuration, weights and tokenizer; of a hub model, its name and commit.

    Raises:
        CheckpointError, DataError, HubUnavailable: no model there, or no tokenizer.
    """
    config = load_hf_config(model)
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{getattr(config, '_commit_hash', None)}"
    load_tokenizer(model)
    digest = hashlib.sha256()
    for file in sorted({folder / "config.json", *weight_files(folder), *tokenizer_files(model)}):
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def text_fingerprint(entries: Sequence[str]) -> str | None:
    """A hash of the files that the entries name; ``None`` where a text on the hub may change, as no commit is pinned.

    Raises:
        DataError: an entry matches nothing or has an unknown format.
    """
    sources = find_sources(entries)
    if not all(source.is_pinned for source in sources):
        return None
    digest = hashlib.sha256()
    for source in sources:
        content = source.describe() if source.path is None else f"{source.path.name} {_sha256(source.path)}"
        digest.update(f"{content}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    """Read once: a model is asked for with every text, and a text with every model."""
    stat = file.stat()
    return _sha256_of_version(file, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_of_version(file: Path, num_bytes: int, mtime_ns: int) -> str:
    return file_sha256(file)
