"""The set of seen documents is a set, on disk or in memory, and comes back after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.data import seen
from steplm.data.seen import LOG, SeenDocuments

KEYS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 40) | st.integers(2**64 - 20, 2**64 - 1), max_size=200)


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "FIRST_SLOTS", 4)


@settings(max_examples=100, deadline=None)
@given(keys=KEYS)
def test_a_key_is_new_once(keys: list[int]) -> None:
    documents, known = SeenDocuments(None), set[int]()
    for key in keys:
        key = key or 1  # the hashes 0 and 1 are taken for one
        assert documents.add(key) == (key not in known)
        known.add(key)


def test_what_was_seen_up_to_a_place_comes_back_and_what_came_after_it_is_new(tmp_path: Path) -> None:
    keys = [key * 0x9E3779B97F4A7C15 % 2**64 for key in range(1, 300)]
    before = SeenDocuments(tmp_path)
    assert all(map(before.add, keys))
    before.sync()
    before.close()
    after = SeenDocuments(tmp_path, num_documents=100)
    assert not any(map(after.add, keys[:100]))
    assert all(map(after.add, keys[100:]))
    after.close()
    assert (tmp_path / LOG).read_bytes() == b"".join(key.to_bytes(8, "little") for key in keys)
    with pytest.raises(ValueError, match="299 hashes of 300 documents"):
        SeenDocuments(tmp_path, num_documents=300)
    SeenDocuments(tmp_path, num_documents=299).close(remove=True)
    assert list(tmp_path.iterdir()) == []
