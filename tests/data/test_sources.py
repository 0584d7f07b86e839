"""Every kind of file gives its documents; every kind of damage is counted, placed and survived."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from steplm.data import formats, sources
from steplm.data.sources import BadRecord, BadRecords, Document, Source, find_sources
from steplm.errors import DataError, HubUnavailable

RECORDS = [{"text": "one"}, {"text": "two"}, {"text": "three é"}]
TEXTS = [record["text"] for record in RECORDS]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
}


def read(*entries: str | Path, text_field: str = "text") -> tuple[list[Document], BadRecords]:
    bad = BadRecords()
    found = find_sources([str(entry) for entry in entries])
    return [document for source in found for document in source.documents(text_field, bad)], bad


def lines(records: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(RECORDS)),
        ("a.ndjson", lines(RECORDS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(RECORDS)),
        ("crlf.jsonl", lines(RECORDS).replace(b"\n", b"\r\n") + b"\r\n\r\n"),
        ("list.json", json.dumps(RECORDS).encode()),
        ("indented.json", json.dumps(RECORDS, indent=1).encode()),
        ("lines.json", b"\n" + lines(RECORDS)),
    ],
)
def test_every_json_layout_gives_the_same_documents(tmp_path: Path, name: str, data: bytes, suffix: str) -> None:
    documents, bad = read(write(tmp_path / (name + suffix), data))
    assert [document.text for document in documents] == TEXTS
    assert (bad.num_records, bad.num_bad) == (3, 0)


@pytest.mark.parametrize(
    "layout", ['{{"text": "one"}}', '{{\n "text": "one"\n}}', '{{"text": "one",\n "id": 3}}', '\n{{"text"\n:"one"}}\n']
)
def test_one_object_is_one_record_whatever_its_line_breaks(tmp_path: Path, layout: str) -> None:
    documents, bad = read(write(tmp_path / "one.json", layout.format().encode()))
    assert [document.text for document in documents] == ["one"]
    assert bad.num_records == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_under_the_key_data_is_read_and_under_another_key_its_fields_are_named(
    tmp_path: Path, indent: int | None
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": RECORDS}, indent=indent))
    documents, _ = read(path)
    assert [document.text for document in documents] == TEXTS
    path.write_text(json.dumps({"version": 1, "rows": RECORDS}, indent=indent))
    _, bad = read(path)
    assert [example.reason for example in bad.examples] == ["no field 'text'; fields are 'version', 'rows'"]


def test_lines_after_a_broken_first_line_are_read(tmp_path: Path) -> None:
    documents, bad = read(write(tmp_path / "a.json", b'{"text": "cut\n' + lines(RECORDS)))
    assert [document.text for document in documents] == TEXTS
    assert [example.origin for example in bad.examples] == [f"{tmp_path / 'a.json'}:1"]


def test_a_broken_object_of_many_lines_is_one_bad_record(tmp_path: Path) -> None:
    whole = json.dumps({"text": "one", "tags": ["a", "b"]}, indent=1).encode()
    documents, bad = read(write(tmp_path / "a.json", whole[:-3]))
    assert documents == []
    assert (bad.num_records, bad.num_bad) == (1, 1)
    assert "broken JSON" in bad.examples[0].reason


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("a.jsonl", '{{"text": "one"}}\n{}\n{{"text": "three"}}'),
        ("a.json", '{{"text": "one"}}\n{}\n{{"text": "three"}}'),
        ("list.json", '[{{"text": "one"}},\n{},\n{{"text": "three"}}]'),
        ("data.json", '{{"data": [{{"text": "one"}}, {}, {{"text": "three"}}]}}'),
    ],
)
def test_a_record_with_a_repeated_key_is_unusable_unless_the_key_is_not_used(
    tmp_path: Path, name: str, layout: str
) -> None:
    documents, bad = read(write(tmp_path / name, layout.format('{"text": "a", "text": "b"}').encode()))
    assert [document.text for document in documents] == ["one", "three"]
    assert bad.examples == [BadRecord(f"{tmp_path / name}:2", "the key 'text' is repeated")]
    for record in ('{"text": "two", "id": 1, "id": 2}', '{"text": "two", "header": {"id": 1, "id": 2}}'):
        documents, bad = read(write(tmp_path / name, layout.format(record).encode()))
        assert [document.text for document in documents] == ["one", "two", "three"]


def test_an_object_with_the_field_is_a_record_whatever_else_it_holds(tmp_path: Path) -> None:
    documents, _ = read(write(tmp_path / "a.json", b'{"text": "one", "data": []}'))
    assert [document.text for document in documents] == ["one"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_rows_that_an_open_quote_swallows_are_no_document(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path / "a.csv", b'id,text\n1,"one\ntwo"\n2,"three\n3,four' + end)
    documents, bad = read(path)
    assert [document.text for document in documents] == ["one\ntwo"]
    reason = "broken CSV: a quote that is never closed, the rest of the file is lost"
    assert bad.examples == [BadRecord(f"{path}:4", reason)]


def test_a_repeated_key_data_and_a_repeated_column_leave_no_record(tmp_path: Path) -> None:
    _, bad = read(write(tmp_path / "a.json", b'{"data": [{"text": "a"}], "data": [{"text": "b"}]}'))
    assert [example.reason for example in bad.examples] == ["the key 'data' is repeated"]
    _, bad = read(write(tmp_path / "a.csv", b"text,id,text\na,1,b"))
    assert [example.reason for example in bad.examples] == ["the column 'text' is repeated"]
    documents, _ = read(write(tmp_path / "b.csv", b"text,id,id\na,1,2"))
    assert [document.text for document in documents] == ["a"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    _, bad = read(tmp_path / "a.parquet")
    assert [example.reason for example in bad.examples] == ["the column 'text' is repeated"]


def test_parquet_gives_its_text_column_and_counts_null_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": ["one", None, "three"], "id": [1, 2, 3]}), path)
    documents, bad = read(path, text_field="content")
    assert documents == [Document("one", f"{path}:1"), Document("three", f"{path}:3")]
    assert bad.examples == [BadRecord(f"{path}:2", "field 'content' is null")]
    _, bad = read(path)
    assert bad.examples == [BadRecord(f"{path}:1", "no column 'text'; columns are 'content', 'id'", count=3)]


def not_utf8(rows: list[bytes]) -> pyarrow.StringArray:
    """A column of strings, as a writer leaves it that does not check its bytes."""
    values = pyarrow.array(rows, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(len(values), values.buffers()[1], values.buffers()[2])


@pytest.mark.parametrize("bad_row", [1, 1024, 1025, 3000])
def test_a_string_of_a_parquet_file_that_is_not_utf8_is_one_bad_record(tmp_path: Path, bad_row: int) -> None:
    path = tmp_path / "a.parquet"
    rows = [b"text %d" % row for row in range(1, 3001)]
    rows[bad_row - 1] = b"caf\xe9 au lait"
    parquet.write_table(pyarrow.table({"text": not_utf8(rows)}), path)
    documents, bad = read(path)
    assert [document.text for document in documents] == [f"text {row}" for row in range(1, 3001) if row != bad_row]
    assert bad.examples == [BadRecord(f"{path}:{bad_row}", "not UTF-8: invalid continuation byte")]


def test_a_column_that_is_not_used_is_not_read_and_one_that_is_used_spoils_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    no_date = pyarrow.array([0, 2**61, 0], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2, 3], "created": no_date}), path)
    source = Source(str(path), path)
    assert [value for _, value in source.records(["text", "id"])] == [
        {"text": text, "id": number} for number, text in enumerate(TEXTS, 1)
    ]
    first, second, third = (value for _, value in source.records())
    assert (first["text"], third["text"]) == (TEXTS[0], TEXTS[2])
    assert str(second).startswith("column 'created' cannot be read: ")


def test_damage_of_a_parquet_file_loses_its_row_group_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{number} " * 50 for number in range(4000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    data = bytearray(path.read_bytes())
    middle = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    documents, bad = read(path)
    assert [document.text for document in documents] == texts[:2000] + texts[3000:]
    assert [example.origin for example in bad.examples] == [f"{path}:2001"]
    assert bad.examples[0].reason.startswith("a damaged table, rows up to 3,000 are lost: ")


def test_a_file_name_that_is_not_utf8_is_read_and_can_be_written_down(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    try:
        write(tmp_path / name, lines(RECORDS))
    except OSError:
        pytest.skip("this file system has no such names")
    documents, _ = read(tmp_path)
    assert [document.origin for document in documents][:1] == [f"{tmp_path}/caf\\xe9.jsonl:1"]
    assert find_sources([str(tmp_path)])[0].describe().startswith("caf\\xe9.jsonl (")


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_a_table_of_text_gives_its_text_column(tmp_path: Path, name: str, delimiter: str) -> None:
    texts = ["one", 'a "quoted" word', "two\nlines", f"é{delimiter} ü"]
    table = io.StringIO(newline="")
    csv.writer(table, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    documents, bad = read(write(tmp_path / name, b"\xef\xbb\xbf" + table.getvalue().encode()))
    assert [document.text for document in documents] == texts
    assert [document.origin.rpartition(":")[2] for document in documents] == ["2", "3", "4", "6"]
    assert bad.num_bad == 0


def test_each_row_of_a_table_of_text_is_used_or_named(tmp_path: Path) -> None:
    long = b"x" * 200_000
    rows = [b"text,id", b"one,1", b"two, too,2", b"caf\xe9,3", b"three,\xe9", b"", b",5", long + b",6", b"last"]
    documents, bad = read(write(tmp_path / "a.csv", b"\n".join(rows)))
    assert [document.text for document in documents] == ["one", "three", long.decode()]
    assert [(example.origin.rpartition(":")[2], example.reason) for example in bad.examples] == [
        ("3", "the row has 3 values, and the header has 2 names"),
        ("4", "not UTF-8"),
        ("7", "field 'text' is empty"),
        ("9", "the row has 1 value, and the header has 2 names"),
    ]
    _, bad = read(write(tmp_path / "b.csv", b"body\none\ntwo"))
    assert bad.examples == [BadRecord(f"{tmp_path / 'b.csv'}:2", "no field 'text'; fields are 'body'", count=2)]


@pytest.mark.parametrize("open_writer", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow_files_give_their_text_column(
    tmp_path: Path, open_writer: Callable[..., pyarrow.RecordBatchWriter]
) -> None:
    table = pyarrow.table({"text": not_utf8([b"one", b"caf\xe9", b"three"]), "id": [1, 2, 3]})
    path = tmp_path / "a.arrow"
    with path.open("wb") as file, open_writer(file, table.schema) as writer:
        for _ in range(2):
            writer.write_table(table)
    documents, bad = read(path)
    assert [(document.text, document.origin) for document in documents] == [
        ("one", f"{path}:1"), ("three", f"{path}:3"), ("one", f"{path}:4"), ("three", f"{path}:6"),
    ]  # fmt: skip
    assert bad.examples == [BadRecord(f"{path}:2", "not UTF-8: unexpected end of data", count=2)]
    _, bad = read(path, text_field="body")
    assert bad.examples == [BadRecord(f"{path}:1", "no column 'body'; columns are 'text', 'id'", count=6)]


def test_bytes_inside_a_list_or_a_dictionary_spoil_only_their_own_rows(tmp_path: Path) -> None:
    strings = not_utf8([b"one", b"caf\xe9"])
    turns = pyarrow.StructArray.from_arrays([strings, strings], ["role", "content"])
    columns = {
        "list": pyarrow.ListArray.from_arrays([0, 1, 2], turns),
        "dictionary": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1]), strings),
    }
    path = tmp_path / "a.arrow"
    for name, column in columns.items():
        table = pyarrow.table({"text": column})
        with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        (_, first), (_, second) = Source(str(path), path).records(["text"])
        assert first == {"text": "one" if name == "dictionary" else [{"role": "one", "content": "one"}]}
        assert str(second) == "not UTF-8: unexpected end of data"


def test_a_string_that_lies_outside_an_arrow_file_is_damage_and_not_read(tmp_path: Path) -> None:
    offsets = np.array([0, 3, 2**30, 5], np.int32)
    outside = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"onetwo"))
    path = tmp_path / "a.arrow"
    batch = pyarrow.RecordBatch.from_arrays([outside], ["text"])
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    documents, bad = read(path)
    assert documents == []
    assert bad.examples[0].reason.startswith("a damaged table, the rest of the file is lost: ")


def test_a_folder_that_datasets_saved_is_read_and_of_several_splits_one_is_asked_for(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(RECORDS)
    datasets.disable_progress_bars()
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    documents, bad = read(tmp_path / "saved")
    assert [document.text for document in documents] == TEXTS
    assert bad.num_bad == 0
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits of a data set: test, train\. Name one"):
        read(tmp_path / "splits")
    assert len(read(tmp_path / "splits" / "test")[0]) == 3


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"paragraph {number} " + "x" * 500 + "\n\n" for number in range(300))
    documents, _ = read(write(tmp_path / "a.txt", text.encode()))
    assert "".join(document.text for document in documents) == text
    assert len(documents) > 3
    assert all(document.text.startswith("paragraph") for document in documents)
    first_lines = [int(document.origin.rpartition(":")[2]) for document in documents]
    assert [text.split("\n")[number - 1] for number in first_lines] == [d.text.split("\n")[0] for d in documents]


def test_a_text_file_without_blank_lines_is_cut_at_lines(tmp_path: Path) -> None:
    text = "a line of some length\n" * 10_000
    documents, _ = read(write(tmp_path / "a.md.gz", text.encode()))
    assert "".join(document.text for document in documents) == text
    assert max(len(document.text) for document in documents) <= 2 * formats.TEXT_PIECE_BYTES + 100


def test_folders_and_globs_give_their_files_in_order_each_once(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.txt", "a.json", "b/.hidden.jsonl", "b/picture.png"):
        write(tmp_path / name, lines(RECORDS))
    names = [source.name for source in find_sources([str(tmp_path), str(tmp_path / "**" / "*.jsonl")])]
    assert names == [str(tmp_path / name) for name in ("a.json", "b/1.txt", "b/2.jsonl")]


def test_each_broken_record_is_placed_explained_and_skipped(tmp_path: Path) -> None:
    broken = [
        (b'{"text": "cut', "broken JSON: Unterminated string"),
        (b'{"txt": "wrong field", "id": 3}', "no field 'text'; fields are 'txt', 'id'"),
        (b'{"text": 7}', "field 'text' is int, not text"),
        (b'{"text": "  "}', "field 'text' is empty"),
        (b'["a", "list"]', "a JSON list, not an object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text" "a"}', "broken JSON: Expecting ':' delimiter"),
        (b"[" * 100_000, "broken JSON"),
    ]
    path = write(
        tmp_path / "a.jsonl",
        b"\n".join([b'{"text": "first"}', *[line for line, _ in broken], lines(RECORDS)]),
    )
    documents, bad = read(path)
    assert [document.text for document in documents] == ["first", *TEXTS]
    assert documents[1].origin == f"{path}:{len(broken) + 2}"
    assert (bad.num_records, bad.num_bad) == (4 + len(broken), len(broken))
    assert [example.origin for example in bad.examples] == [f"{path}:{n}" for n in range(2, len(broken) + 2)]
    for example, (_, reason) in zip(bad.examples, broken, strict=True):
        assert reason in example.reason


@pytest.mark.parametrize("record", ['{"text": "%s', '{"text": "%s" "a"}', '{"text": "%s\\x"}', '{"text": "%s\\ud800"}'])
def test_a_reason_is_the_same_wherever_in_the_line_it_is(tmp_path: Path, record: str) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(record % ("a" * length) for length in range(9)).encode())
    _, bad = read(path)
    (example,) = bad.examples
    assert (example.origin, example.count) == (f"{path}:1", 9)
    assert not re.search(r"\d{2}|line|column|char|at$|:$", example.reason)


def test_a_broken_file_of_one_object_is_placed_by_its_line(tmp_path: Path) -> None:
    _, bad = read(write(tmp_path / "a.json", b'[\n{"text": "a"}\n{"text": "b"}\n]'))
    assert bad.examples[0].reason == "broken JSON: Expecting ',' delimiter at line 3"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_comes_before_the_cut_of_a_truncated_file_is_kept(tmp_path: Path, suffix: str) -> None:
    noise = random.Random(0)
    texts = [f"{number} " + "".join(noise.choices("abcdefgh ", k=300)) for number in range(9000)]
    whole = COMPRESS[suffix](lines([{"text": text} for text in texts]))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    documents, bad = read(path)
    assert 100 < len(documents) < 9000
    assert [document.text for document in documents] == texts[: len(documents)]
    assert bad.num_bad == 1
    assert bad.examples[0].origin == f"{path}:{len(documents) + 1}"
    assert f"truncated {suffix}, the rest of the file is lost" in bad.examples[0].reason


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_put_together_are_one_file(tmp_path: Path, suffix: str) -> None:
    """As parallel compressors write them."""
    parts = [COMPRESS[suffix](json.dumps(record).encode() + b"\n") for record in RECORDS]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(parts))
    assert [document.text for document in read(path)[0]] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.bz2", "a.txt.xz", "a.csv.zst", "a.parquet", "a.arrow"])
def test_a_file_that_is_not_what_its_name_says_is_one_bad_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is neither gzip nor parquet" * 10)
    documents, bad = read(path)
    assert documents == []
    assert bad.num_bad == 1
    assert bad.examples[0].origin == f"{path}:1"


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt"):
        assert read(write(tmp_path / name, b"")) == ([], BadRecords())


def test_a_pattern_without_a_match_tells_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", b"")
    with pytest.raises(DataError, match=r"no text found at .*tran\.jsonl.*Did you mean '.*train\.jsonl'\?"):
        find_sources([str(tmp_path / "tran.jsonl")])
    with pytest.raises(DataError, match="no text found"):
        find_sources([str(tmp_path / "nothing" / "*.jsonl")])


def test_a_named_file_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    for name in ("a.zip", "a", ".gz", "a.gz", "a.parquet.gz", "a.arrow.zst"):
        with pytest.raises(DataError, match="unknown format"):
            find_sources([str(write(tmp_path / name, b"x"))])


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("hubb://a/b", "Did you mean hub://a/b"),
        ("s3://a/b", "Known: hub://, builtin://"),
        ("builtin://novels", "builtin://python-docs"),
        ("hub://a/b?splt=train", "Did you mean 'split'"),
    ],
)
def test_a_wrong_address_tells_the_right_one(entry: str, hint: str) -> None:
    with pytest.raises(DataError, match=hint.replace("?", r"\?")):
        find_sources([entry])


def test_a_share_of_bad_records_above_the_limit_raises_with_the_first_examples() -> None:
    bad = BadRecords(max_bad_share=0.02)
    for number in range(20):
        bad.add(f"a.jsonl:{number}", f"broken at byte {number}")
    bad.num_records = 1000
    bad.check()
    bad.max_bad_share = 0.0199
    with pytest.raises(DataError, match=r"(?s)20 of 1,000 records \(2\.00%\).*a\.jsonl:0: broken") as caught:
        bad.check()
    assert caught.value.num_bad == 20
    assert "a.jsonl:9: broken at byte 9\n  and 10 more for other reasons\nFix" in str(caught.value)
    assert len(bad.examples) == sources.NUM_EXAMPLES


def test_a_reason_is_told_once_with_its_first_place_and_its_count() -> None:
    bad = BadRecords(max_bad_share=0.5)
    for number in range(1, 31):
        bad.add(f"a.jsonl:{number}", "no field 'content'; fields are 'text'")
    with pytest.raises(DataError) as caught:
        bad.check()
    listing = [line for line in str(caught.value).splitlines() if "no field" in line]
    assert listing == ["  a.jsonl:1: no field 'content'; fields are 'text' (and 29 more like it)"]


def test_a_source_of_which_nothing_can_be_used_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"content": "text"}\n' * (2 * sources.HOPELESS_RECORDS))
    bad = BadRecords(max_bad_share=0.5)
    with pytest.raises(DataError, match="no field 'text'; fields are 'content'"):
        list(Source(str(path), path).documents("text", bad))
    assert bad.num_records == sources.HOPELESS_RECORDS


def test_a_hub_address_becomes_a_streamed_data_set(
    hub_gives: Callable[[list[Any]], list[tuple[Any, Any]]],
) -> None:
    calls = hub_gives(RECORDS)
    entry = "hub://owner/name?name=sample-10BT&split=test&revision=0123abc"
    documents, bad = read(entry)
    assert [document.text for document in documents] == TEXTS
    arguments = {"streaming": True, "name": "sample-10BT", "split": "test", "revision": "0123abc"}
    assert calls == [(("owner/name",), arguments)]
    assert [source.describe() for source in find_sources([entry])] == [entry]  # a part of the inputs
    assert bad.num_records == 3


class BreakingStream:
    """A data set that loses its connection after so many records from its beginning."""

    def __init__(self, records: list[dict[str, str]], breaks_after: int | None, start: int = 0) -> None:
        self.records, self.breaks_after, self.start = records, breaks_after, start

    def skip(self, num_records: int) -> BreakingStream:
        return BreakingStream(self.records, self.breaks_after, num_records)

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield from self.records[self.start : self.breaks_after]
        if self.breaks_after is not None:
            raise ConnectionError("network is down")


def test_a_hub_that_breaks_off_is_unavailable_and_says_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")

    waits: list[float] = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: BreakingStream(RECORDS, breaks_after=3))
    with pytest.raises(HubUnavailable, match=r"after 3 records.*network is down") as caught:
        read("hub://owner/name")
    assert caught.value.num_records == 3
    assert waits == list(sources.HUB_RETRY_SECONDS)


def test_a_stream_that_breaks_off_goes_on_after_the_records_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    waits: list[float] = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    # Two breaks with records between them: each is a first failure.
    breaks = iter([1, 2, None])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: BreakingStream(RECORDS, breaks_after=next(breaks))
    )
    documents, bad = read("hub://owner/name")
    assert [document.text for document in documents] == TEXTS
    assert [document.origin for document in documents] == [f"hub://owner/name:{row}" for row in (1, 2, 3)]
    assert bad.num_records == 3
    assert waits == [sources.HUB_RETRY_SECONDS[0]] * 2


def test_a_hub_without_network_is_unavailable() -> None:
    with pytest.raises(HubUnavailable, match="name local files"):
        read("hub://owner/name")


def test_a_data_set_that_does_not_exist_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: object, **kwargs: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="doesn't exist") as caught:
        read("hub://owner/name")
    assert not isinstance(caught.value, HubUnavailable)


def test_the_description_of_a_file_changes_with_its_content(jsonl: Callable[..., Path]) -> None:
    before = [source.describe() for source in find_sources([str(jsonl(["one"]))])]
    after = [source.describe() for source in find_sources([str(jsonl(["other"]))])]
    assert before != after


@pytest.mark.parametrize("entry", ["hub://[", "~no-such-user/text.jsonl", "x" * 300 + ".txt", "a\0b.txt"])
def test_an_entry_that_no_system_can_have_is_refused(entry: str) -> None:
    with pytest.raises(DataError):
        find_sources([entry])


def test_a_record_of_many_fields_is_explained_by_a_few(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"k" * 999: 1, **{f"key {number}": 1 for number in range(5000)}}))
    bad = BadRecords()
    assert list(Source(str(path), path).documents("text", bad)) == []
    assert bad.examples[0].reason.endswith("'key 8', ...")
    assert len(bad.examples[0].reason) < 250
