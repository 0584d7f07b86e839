"""Hashes of models and texts, to tell what a saved result was computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from steplm.data.sources import find_sources
from steplm.data.tokenizer import load_tokenizer, tokenizer_files
from steplm.files import file_sha256
from steplm.models.folder import load_hf_config, weight_files


def model_fingerprint(model: str) -> str:
    """Hash a local model's config, weights and tokenizer; for a hub model, return its name and commit.

    Raises:
        CheckpointError, DataError, HubUnavailable: no model or no tokenizer was found.
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
    """Hash the files that the entries name; ``None`` if a hub dataset may change because no commit is pinned.

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
    """Cached, because each model is hashed again for every text and each text for every model."""
    stat = file.stat()
    return _sha256_of_version(file, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_of_version(file: Path, num_bytes: int, mtime_ns: int) -> str:
    return file_sha256(file)
