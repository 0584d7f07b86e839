"""Documents, and tokenizers that a user names: any bytes under any name that is read."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from steplm.config import RunConfig
from steplm.data.formats import RANDOM_ACCESS, READERS
from steplm.data.prepare import prepare
from steplm.data.sources import BadRecords, find_sources
from steplm.data.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer

fuzz = settings.get_profile("fuzz")
Claim = Callable[..., AbstractContextManager[None]]
Fresh = Callable[[], AbstractContextManager[Path]]
SpoilBytes = Callable[[st.DataObject, bytes], bytes]
SpoilFile = Callable[[st.DataObject, Path], None]

SUFFIXES = [*READERS, *(f"{suffix}.gz" for suffix in READERS if suffix not in RANDOM_ACCESS), ".csv.zst", ".json.xz"]
RECORDS = [{"text": f"document {number} " * 9, "n": number} for number in range(12)]


def _parquet(columns: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def _arrow(columns: dict[str, Any]) -> bytes:
    stream, table = io.BytesIO(), pyarrow.table(columns)
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
WHOLE = [
    LINES,
    json.dumps(RECORDS).encode(),
    json.dumps(RECORDS, indent=1).encode(),
    gzip.compress(LINES),
    _parquet({"text": [record["text"] for record in RECORDS]}),
    _parquet({"text": [b"\xff\xfe", b"x", None]}),
    _parquet({"text": [1, 2, 3], "other": ["a", "b", "c"]}),
    _parquet({"text": [{"a": 1}, {"a": 2}]}),
    _parquet({"text": ["a", "b"], "created": pyarrow.array([0, 2**61], pyarrow.timestamp("us"))}),
    _parquet({"text": pyarrow.array([0, 2**61], pyarrow.timestamp("us"))}),
    _parquet(
        {
            "text": pyarrow.StringArray.from_buffers(
                2, *map(pyarrow.py_buffer, (bytes(4) + b"\1\0\0\0\2\0\0\0", b"\xe9a"))
            )
        }
    ),
    json.dumps({"data": RECORDS}, indent=1).encode(),
    _arrow({"text": [record["text"] for record in RECORDS], "n": [1] * len(RECORDS)}),
    _arrow({"text": [["a"], ["b", "c"]], "n": [{"a": 1}, {"a": 2}]}),
    b"n,text\n" + b"".join(b'%d,"document, %d"\n' % (number, number) for number in range(12)),
    pyarrow.compress(LINES, codec="zstd", asbytes=True),
    b'{"text": "\\ud800"}\n',
    b'{"text": 1' + b"0" * 5000 + b"}\n",
    b'{"' + b"k" * 20_000 + b'": 1}\n',
    json.dumps({f"key {number}": 1 for number in range(5000)}).encode(),
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    b"\xff\xfe" + "text".encode("utf-16-le"),
    gzip.compress(LINES)[:-4] + b"\0\0\0\0",
    gzip.compress(LINES) + b"rest",
]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([record["text"] for record in RECORDS], 280).save_pretrained(path)
    return path


def read_documents(entry: str) -> None:
    bad = BadRecords(max_bad_share=0.001)
    for source in find_sources([entry]):
        source.describe()
        for document in source.documents("text", bad):
            document.text.encode()
    bad.check()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", WHOLE, ids=range(len(WHOLE)))
def test_a_file_under_another_name_is_read_or_refused(
    content: bytes, suffix: str, claim: Claim, tmp_path: Path
) -> None:
    file = tmp_path / f"any{suffix}"
    file.write_bytes(content)
    with claim():
        read_documents(str(file))


@fuzz
@given(data=st.data())
def test_any_bytes_are_documents_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, spoil_bytes: SpoilBytes
) -> None:
    content = spoil_bytes(data, data.draw(st.sampled_from(WHOLE), label="content"))
    suffix = data.draw(st.sampled_from(SUFFIXES), label="suffix")
    if suffix.endswith(".gz") and data.draw(st.booleans(), label="compressed"):
        content = gzip.compress(content)
    with fresh_folder() as folder:
        (folder / f"any{suffix}").write_bytes(content)
        with claim():
            read_documents(str(folder / f"any{suffix}"))


@fuzz
@given(data=st.data())
def test_any_documents_are_prepared_or_refused(
    data: st.DataObject,
    claim: Claim,
    fresh_folder: Fresh,
    spoil_bytes: SpoilBytes,
    tokenizer_dir: Path,
) -> None:
    suffix = data.draw(st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".txt", ".parquet"]), label="suffix")
    whole = {".json": WHOLE[1], ".parquet": WHOLE[4], ".jsonl.gz": WHOLE[3]}.get(suffix, LINES)
    trained = data.draw(st.integers(0, 4), label="tokenizer") == 0
    with fresh_folder() as folder:
        (folder / f"any{suffix}").write_bytes(spoil_bytes(data, whole))
        values = {
            "train": [str(folder / f"any{suffix}")],
            "tokenizer": "train" if trained else str(tokenizer_dir),
            "validation_fraction": 0.3,
            "max_bad_share": data.draw(st.sampled_from([0.0, 1.0]), label="bad share"),
            "prepared_dir": str(folder / "prepared"),
            "num_workers": 1,
        }
        with claim(folder / "prepared"):
            prepare(RunConfig.model_validate({"model": {"vocab_size": 300}, "data": values}))


ENTRIES = st.one_of(
    st.text(max_size=20).filter(lambda text: "*" not in text and "?" not in text and "[" not in text),
    st.builds("{}://{}".format, st.sampled_from(["hub", "builtin", "file", "http", "hubb", ""]), st.text(max_size=12)),
    st.builds("~x{}".format, st.text(max_size=4)),
    st.sampled_from(["hub://[", "hub://]", "hub://a/b?c=d", "a\0b.jsonl", "x" * 300, "~nobody/x", "[", "\ud800"]),
)


@fuzz
@given(entry=ENTRIES)
def test_any_entry_of_data_train_is_found_or_refused(entry: str, claim: Claim) -> None:
    if entry.strip("/.~") == "":  # folders that are there, and large
        return
    with claim():
        find_sources([entry])
    if "://" not in entry and entry:
        with claim():
            tokenizer_files(entry)


@fuzz
@given(data=st.data())
def test_any_tokenizer_file_is_read_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, tokenizer_dir: Path, spoil_file: SpoilFile
) -> None:
    with fresh_folder() as folder:
        for file in tokenizer_dir.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        spoil_file(data, folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), label="file"))
        with claim():
            load_tokenizer(folder)


PIECES = (b"\n\x05<unk>\x18\x02", b"\n\x04</s>\x18\x03", b"\n\x01a", b"\n\x01b")
SENTENCEPIECE = b"".join(b"\n" + bytes([len(piece)]) + piece for piece in PIECES) + b"\x12\2\x18\2\x1a\4\x18\1\x20\0"


@fuzz
@given(data=st.data())
def test_any_sentencepiece_file_is_read_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, spoil_bytes: SpoilBytes
) -> None:
    with fresh_folder() as folder:
        (folder / "tokenizer.model").write_bytes(spoil_bytes(data, SENTENCEPIECE))
        with claim():
            load_tokenizer(folder / "tokenizer.model")


def test_the_sentencepiece_file_is_one_before_it_is_spoiled(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    assert load_tokenizer(tmp_path / "tokenizer.model").eos_token == "</s>"
