"""Parquet files of any columns, whole and spoiled."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from steplm.data.sources import BadRecords, find_sources
from steplm.sft.records import read_conversations

fuzz = settings.get_profile("fuzz")
Claim = Callable[..., AbstractContextManager[None]]
Fresh = Callable[[], AbstractContextManager[Path]]
SpoilBytes = Callable[[st.DataObject, bytes], bytes]

ROWS = 5
NAMES = ("text", "instruction", "output", "messages", "created", "prompt", "")


def _strings(values: list[bytes | None]) -> pyarrow.Array:
    """Of any bytes, which pyarrow itself would not make strings of."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


BYTES = st.one_of(
    st.none(), st.text(max_size=8).map(str.encode), st.sampled_from([b"", b"\xff", b"\xed\xa0\x80", b"a\0b"])
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", None, ""]),
        "content": st.none() | st.text(max_size=5),
    }
)


def _typed(type_: pyarrow.DataType, values: st.SearchStrategy[Any]) -> st.SearchStrategy[pyarrow.Array]:
    return st.lists(st.none() | values, min_size=ROWS, max_size=ROWS).map(lambda held: pyarrow.array(held, type_))


COLUMNS = st.one_of(
    st.lists(BYTES, min_size=ROWS, max_size=ROWS).map(_strings),
    st.lists(BYTES, min_size=ROWS, max_size=ROWS).map(lambda held: _strings(held).dictionary_encode()),
    st.just(pyarrow.nulls(ROWS)),
    _typed(pyarrow.large_string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    _typed(pyarrow.binary(), st.binary(max_size=8)),
    _typed(pyarrow.timestamp("us"), st.integers(-(2**62), 2**62)),
    _typed(pyarrow.date32(), st.integers(-(2**31), 2**31 - 1)),
    _typed(pyarrow.float64(), st.floats()),
    _typed(
        pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
        st.lists(MESSAGE, max_size=3),
    ),
    _typed(pyarrow.struct([("a", pyarrow.int64())]), st.just({"a": 1})),
)


@fuzz
@given(data=st.data())
def test_each_row_of_any_table_is_used_or_named(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, spoil_bytes: SpoilBytes
) -> None:
    columns = {data.draw(st.sampled_from(NAMES), label="name"): data.draw(COLUMNS) for _ in range(3)}
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream, row_group_size=data.draw(st.sampled_from([2, ROWS])))
    is_spoiled = data.draw(st.booleans(), label="spoiled")
    with fresh_folder() as folder:
        file = folder / "any.parquet"
        file.write_bytes(spoil_bytes(data, stream.getvalue()) if is_spoiled else stream.getvalue())
        bad = BadRecords()
        documents = []
        with claim():
            for source in find_sources([str(file)]):
                documents = list(source.documents("text", bad))
        for document in documents:
            document.text.encode()
        if not is_spoiled:
            assert bad.num_records == ROWS
            assert len(documents) == ROWS - bad.num_bad
        with claim():
            records = read_conversations([str(file)])
            for conversation in records.conversations:
                assert all(message["content"].encode() for message in conversation.messages if message["content"])
