"""Tokens of other programs are used where they lie, and are the same tokens; what is none of them is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.config import RunConfig
from steplm.data.loader import training_loader
from steplm.data.prepare import prepare
from steplm.data.shards import ShardWriter
from steplm.data.token_files import open_token_file
from steplm.data.tokenizer import load_tokenizer
from steplm.data.tokens import TokenDataset, verify
from steplm.errors import ConfigError, DataError

Documents = list[list[int]]
Configure = Callable[..., RunConfig]


def nanogpt(path: Path, documents: Documents) -> None:
    np.concatenate(documents).astype("<u2").tofile(path)


def llm_c(path: Path, documents: Documents, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    tokens = np.concatenate(documents).astype(dtype)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def llm_c_llama_3(path: Path, documents: Documents) -> None:
    llm_c(path, documents, 20240801, 7, "<u4")


def megatron(path: Path, documents: Documents, code: int = 4, dtype: str = "<i4") -> None:
    """As ``MMapIndexedDatasetBuilder`` writes it, one sequence a document."""
    lengths = np.array(list(map(len, documents)), "<i4")
    tokens = np.concatenate(documents).astype(dtype)
    tokens.tofile(path)
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * tokens.itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    places = np.arange(len(lengths) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + places.tobytes())


def megatron_short(path: Path, documents: Documents) -> None:
    megatron(path, documents, code=8, dtype="<u2")


def megatron_long(path: Path, documents: Documents) -> None:
    megatron(path, documents, code=5, dtype="<i8")


WRITERS = (nanogpt, llm_c, llm_c_llama_3, megatron, megatron_short, megatron_long)


@pytest.fixture
def documents(texts: list[str], tokenizer_dir: Path) -> Documents:
    tokenizer = load_tokenizer(tokenizer_dir)
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]


def tokens_of(config: RunConfig, split: str) -> Documents:
    dataset = TokenDataset(config.prepared_dir, split)
    return [dataset.document(index).tolist() for index in range(dataset.num_documents)]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_gives_its_documents_without_a_copy(
    configure: Configure, documents: Documents, texts: list[str], tmp_path: Path, write: Callable[..., None]
) -> None:
    (tmp_path / "tokens").mkdir()
    write(tmp_path / "tokens" / "a.bin", documents[:30])
    write(tmp_path / "tokens" / "b.bin", documents[30:50])
    write(tmp_path / "val.bin", documents[50:])
    config = configure(train=str(tmp_path / "tokens" / "*.bin"), validation=str(tmp_path / "val.bin"))
    manifest = prepare(config)
    assert tokens_of(config, "train") == documents[:50]
    assert tokens_of(config, "validation") == documents[50:]
    assert manifest.dtype == ("uint16" if write in (nanogpt, llm_c, megatron_short, megatron_long) else "uint32")
    copied = bool(list(config.prepared_dir.rglob("shard-*.bin")))
    assert copied == (write is megatron_long)  # 8 bytes a token are none of our widths
    assert manifest.split("validation").num_text_bytes == sum(len(text.encode()) for text in texts[50:])
    assert verify(config.prepared_dir) == prepare(config) == manifest


def test_a_run_reads_token_files_beside_text(
    configure: Configure, documents: Documents, jsonl: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    megatron(tmp_path / "web.bin", documents[:40])
    sources = [
        {"name": "web", "files": str(tmp_path / "web.bin"), "weight": 0.5},
        {"name": "books", "files": str(jsonl(texts[40:55])), "weight": 0.5},
    ]
    config = configure(train=sources, validation=str(jsonl(texts[55:], "validation.jsonl")))
    assert prepare(config).dtype == "uint32"
    assert tokens_of(config, "train/web") == documents[:40]
    assert tokens_of(config, "train/books") == documents[40:55]
    config = config.model_copy(update={"train": config.train.model_copy(update={"sequence_length": 8})})
    assert training_loader(config).batch(0, 10).source_ids.sum() == 5


def test_files_of_another_width_than_the_runs_are_copied(
    configure: Configure, documents: Documents, tmp_path: Path
) -> None:
    nanogpt(tmp_path / "a.bin", documents[:40])
    megatron(tmp_path / "b.bin", documents[40:50])
    nanogpt(tmp_path / "val.bin", documents[50:])
    config = configure(
        train=[str(tmp_path / "a.bin"), str(tmp_path / "b.bin")], validation=str(tmp_path / "val.bin"), shard_tokens=500
    )
    assert prepare(config).dtype == "uint32"
    assert tokens_of(config, "train") == documents[:50]
    files = [shard.tokens_file for shard in TokenDataset(config.prepared_dir, "train").shards]
    assert files[-1] == str(tmp_path / "b.bin")
    assert set(files[:-1]) == {None}


@pytest.mark.parametrize("num_closed", [4, 6, 8, 9])
def test_an_interrupted_take_over_goes_on_and_gives_the_same(
    configure: Configure, documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_closed: int
) -> None:
    nanogpt(tmp_path / "a.bin", documents[:30])  # copied, as b.bin is wider
    megatron(tmp_path / "b.bin", documents[30:50])
    nanogpt(tmp_path / "c.bin", documents[50:])
    common = {"train": [str(tmp_path / f"{name}.bin") for name in "ab"], "validation": str(tmp_path / "c.bin")}
    broken, unbroken = (
        configure(**common, shard_tokens=300, prepared_dir=str(tmp_path / name)) for name in ("broken", "unbroken")
    )
    prepare(unbroken)
    close, calls = ShardWriter.close, []

    def interrupted(writer: ShardWriter) -> None:
        calls.append(writer)
        if len(calls) == num_closed + 1:
            raise KeyboardInterrupt
        close(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(broken)
    prepare(broken)
    for file in unbroken.prepared_dir.rglob("*"):
        if file.is_file():
            assert (broken.prepared_dir / file.relative_to(unbroken.prepared_dir)).read_bytes() == file.read_bytes()


def test_a_changed_token_file_is_found_and_never_removed(
    configure: Configure, documents: Documents, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    nanogpt(path, documents[:40])
    nanogpt(tmp_path / "val.bin", documents[40:])
    config = configure(train=str(path), validation=str(tmp_path / "val.bin"))
    prepare(config)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.bin is not what was written: its hash differs"):
        verify(config.prepared_dir)
    path.write_bytes(data[:-2])
    with pytest.raises(DataError, match="tokens of other inputs"):
        prepare(config)
    with pytest.raises(DataError, match=r"a\.bin has .* bytes, the manifest says"):
        TokenDataset(config.prepared_dir, "train")
    assert path.is_file()


def test_tokens_of_another_tokenizer_are_refused(configure: Configure, documents: Documents, tmp_path: Path) -> None:
    def refused(train: Documents, match: str) -> None:
        nanogpt(tmp_path / "a.bin", train)
        with pytest.raises(DataError, match=match):
            prepare(configure(train=str(tmp_path / "a.bin"), validation=str(tmp_path / "val.bin")))

    nanogpt(tmp_path / "val.bin", documents[40:])
    refused([[5, 300, documents[0][-1]]], r"has the token 300, and the tokenizer has 300: set data\.tokenizer")
    refused([document[:-1] for document in documents[:40]], r"has no token \d+, the end of text.*--append-eod")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"tokenizer": "train", "validation": "a.bin"}, r"set data\.tokenizer to the one that made them"),
        ({}, r"no validation text is split off: set data\.validation"),
        ({"validation": "a.bin", "max_train_tokens": 5}, r"data\.max_train_tokens limits text"),
        ({"train": ["a.bin", "b.jsonl"], "validation": "a.bin"}, r"data\.train names text and tokens"),
    ],
)
def test_what_tokens_cannot_give_is_an_error_of_the_configuration(
    configure: Configure, data: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        prepare(configure(**{"train": "a.bin", **data}))
    with pytest.raises(DataError, match=r"no token file found at 'missing\.bin'"):
        prepare(configure(train="missing.bin", validation="missing.bin"))


def test_a_file_that_is_cut_short_is_refused(documents: Documents, tmp_path: Path) -> None:
    for write in WRITERS:
        path = tmp_path / f"{write.__name__}.bin"
        write(path, documents)
        assert open_token_file(path).num_tokens == sum(map(len, documents))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match="cut short or not a token file"):
            open_token_file(path)
        path.write_bytes(b"")
        with pytest.raises(DataError, match="cut short or not a token file"):
            open_token_file(path)


@settings(max_examples=100, deadline=None)
@given(index=st.binary(max_size=60), data=st.binary(max_size=40), has_magic=st.booleans(), has_index=st.booleans())
def test_any_bytes_are_a_token_file_or_refused(
    tmp_path_factory: pytest.TempPathFactory, index: bytes, data: bytes, has_magic: bool, has_index: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(data)
    path.with_suffix(".idx").unlink(missing_ok=True)
    if has_index:
        path.with_suffix(".idx").write_bytes((b"MMIDIDX\0\0" if has_magic else b"") + index)
    try:
        file = open_token_file(path)
    except DataError:
        return
    assert len(file.read()) == file.num_tokens
