"""What is told of prepared documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from steplm.data.statistics import described, document_statistics
from steplm.data.tokens import TokenDataset


def _documents(lengths: list[int]) -> list[list[int]]:
    return [list(range(100, 100 + length)) for length in lengths]


def test_lengths_cuts_and_ends_are_those_counted_by_hand(make_dataset: Callable[..., TokenDataset]) -> None:
    lengths = [1, 2, 3, 4, 6, 8, 8]  # they begin at 0, 1, 3, 6, 10, 16 and 24, and end at 32
    dataset = make_dataset(_documents(lengths))
    assert dataset.document_lengths.tolist() == lengths
    statistics = document_statistics(dataset, 8)
    assert statistics.by_length == (1, 2, 2, 2)
    assert (statistics.num_documents, statistics.num_tokens, statistics.longest) == (7, 32, 8)
    assert statistics.num_cut == 1  # the one from 6 to 10
    assert statistics.num_inside == 4  # at 1, 3, 6 and 10; those at 16, 24 and 32 end a window
    lines = list(described(statistics))
    assert lines[0].split() == ["1", "to", "1", "tokens", "14.3%", "█" * 15]
    assert lines[3].split() == ["8", "to", "8", "tokens", "28.6%", "█" * 30]
    assert "3 windows of 8 tokens: no padding, 1.3 documents end inside each, 14.3% of documents are cut" in lines[4]
    assert lines[4].endswith("7 tokens left over per epoch")


def test_shards_are_counted_as_one(make_dataset: Callable[..., TokenDataset]) -> None:
    documents = _documents([5, 9, 2, 17, 30, 4, 4, 12])
    many = document_statistics(make_dataset(documents, shard_tokens=20), 16)
    assert many == document_statistics(make_dataset(documents, shard_tokens=1000), 16)


def test_the_manifest_counts_documents_by_length_over_all_shards(make_dataset: Callable[..., TokenDataset]) -> None:
    dataset = make_dataset(_documents([5, 9, 2, 17, 30, 4, 4, 12]), shard_tokens=20)
    assert len(dataset.shards) > 2
    split = dataset.manifest.split("train")
    assert split.documents_by_length == document_statistics(dataset, 16).by_length == (0, 1, 3, 2, 2)
    older = replace(split, shards=(replace(split.shards[0], documents_by_length=()), *split.shards[1:]))
    assert older.documents_by_length == ()
