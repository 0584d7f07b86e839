"""Small documents on disk, small runs over them, and token shards made by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steplm.config import RunConfig, load_config
from steplm.data.shards import ShardWriter, write_json
from steplm.data.tokenizer import train_tokenizer
from steplm.data.tokens import MANIFEST, Manifest, SplitManifest, TokenDataset, TokenizerManifest
from steplm.types import to_json

SPLITS = ("train", "validation")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 documents, no two equal, some longer than others."""
    words = ["layer", "model", "token", "growth", "memory", "plan", "stage", "frozen", "adapter", "ünï", "語"]
    generator = random.Random(1)
    return [f"{number} " + " ".join(generator.choices(words, k=generator.randint(1, 80))) for number in range(60)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """``jsonl(texts, name)``: a file with a record per text, gzipped if the name says so."""

    def write(texts: Sequence[str], name: str = "documents.jsonl") -> Path:
        path = tmp_path / name
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer_dir(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 tokens, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 300).save_pretrained(path)
    return path


@pytest.fixture
def configure(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., RunConfig]:
    """``configure(train=..., **data)``: a run that prepares into ``tmp_path/prepared``."""

    def make(vocab_size: int = 300, **data: Any) -> RunConfig:
        defaults = {
            "tokenizer": str(tokenizer_dir),
            "validation_fraction": 0.1,
            "prepared_dir": str(tmp_path / "prepared"),
            "num_workers": 1,
        }
        return load_config({"model": {"vocab_size": vocab_size}, "data": {**defaults, **data}})

    return make


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., TokenDataset]:
    """``make_dataset(documents, shard_tokens)``: the training split holds these token lists as they are."""

    def make(documents: Sequence[Sequence[int]], shard_tokens: int = 10, dtype: str = "uint16") -> TokenDataset:
        folder = tmp_path / f"by_hand_{len(list(tmp_path.iterdir()))}"
        writers = {s: ShardWriter(folder / s, dtype=dtype, shard_tokens=shard_tokens) for s in SPLITS}
        for position, document in enumerate(documents):
            for writer in writers.values():
                writer.append(position, np.array(document, dtype), len(document))
        for writer in writers.values():
            writer.close()
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
        manifest = Manifest(
            fingerprint="by hand",
            dtype=dtype,
            tokenizer=TokenizerManifest("by hand", int(np.iinfo(dtype).max) + 1, 0, hashlib.sha256(b"{}").hexdigest()),
            splits={split: SplitManifest(tuple(writer.shards)) for split, writer in writers.items()},
            num_records=len(documents),
            num_bad_records=0,
            num_duplicates=0,
            bad_records=(),
        )
        write_json(folder / MANIFEST, to_json(manifest))
        return TokenDataset(folder, "train")

    return make
