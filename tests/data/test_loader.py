"""A batch is a pure function of (seed, tokens seen, rank, world size), and an epoch misses nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.data import loader as loader_module
from steplm.data.loader import (
    IGNORE_INDEX,
    Batch,
    BatchLoader,
    Prefetcher,
    _splitmix64,
    permuted,
    shuffled,
    validation_windows,
)
from steplm.data.tokens import TokenDataset
from steplm.errors import DataError

GOLDEN_ORDER = [9, 0, 4, 1, 6, 5, 7, 8, 3, 2]
GOLDEN_PERMUTATION = [7, 8, 5, 4, 1, 6, 2, 0, 9, 3]
GOLDEN_PLACES = [14767570, 94865502, 58798917]
LENGTHS = [3, 7, 1, 12, 5, 2, 9, 4, 6, 11, 8]
S = 4


@pytest.fixture
def dataset(make_dataset: Callable[..., TokenDataset]) -> TokenDataset:
    """Eleven documents over several shards; every token is unique, so that its place is known."""
    numbers = iter(range(1000, 2000))
    return make_dataset([[next(numbers) for _ in range(length)] for length in LENGTHS], shard_tokens=15)


@pytest.fixture(params=["documents", "windows"])
def order(request: pytest.FixtureRequest) -> str:
    return request.param


def loader(dataset: TokenDataset, seed: int = 0, within_documents: bool = False, order: str = "") -> BatchLoader:
    limit = {"max_sorted_windows": None if order == "documents" else 0} if order else {}
    return BatchLoader(dataset, seed=seed, sequence_length=S, within_documents=within_documents, **limit)


def epoch_inputs(batches: BatchLoader, epoch: int) -> torch.Tensor:
    windows = batches.sources[0].per_epoch
    return batches.batch(epoch * windows * S, windows).input_ids


def test_the_same_arguments_give_the_same_batch_in_any_order(dataset: TokenDataset, order: str) -> None:
    forward, backward = loader(dataset, order=order), loader(dataset, order=order)
    places = range(0, 40 * S, S)
    first = {place: forward.batch(place, 3).input_ids for place in places}
    for place in reversed(places):
        assert torch.equal(backward.batch(place, 3).input_ids, first[place])


def test_large_batches_are_small_batches_put_together(dataset: TokenDataset, order: str) -> None:
    """Also across the end of an epoch."""
    batches = loader(dataset, order=order)
    large = batches.batch(0, 40)
    small = [batches.batch(number * 5 * S, 5) for number in range(8)]
    assert torch.equal(large.input_ids, torch.cat([batch.input_ids for batch in small]))
    assert torch.equal(large.labels, torch.cat([batch.labels for batch in small]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_the_parts_of_all_ranks_are_the_global_batch(dataset: TokenDataset, world_size: int, order: str) -> None:
    for num_sequences in (1, 6, 8):
        whole = loader(dataset, order=order).batch(2 * S, num_sequences)
        parts = [
            loader(dataset, order=order).batch(2 * S, num_sequences, rank, world_size) for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_epoch_visits_every_window_once(dataset: TokenDataset, order: str) -> None:
    total = sum(LENGTHS)
    for epoch in range(5):
        seen = epoch_inputs(loader(dataset, order=order), epoch).flatten().tolist()
        assert len(seen) == len(set(seen)) == (total - 1) // S * S


def test_labels_are_the_next_tokens_and_documents_stay_whole(dataset: TokenDataset, order: str) -> None:
    """Inside a document the next token is known; after its last comes the first of another."""
    firsts = {int(token) for token in 1000 + dataset.document_offsets[:-1]}
    lasts = {int(token) - 1 for token in 1000 + dataset.document_offsets[1:]}
    for epoch in range(3):
        batch = loader(dataset, order=order).batch(
            epoch * loader(dataset, order=order).sources[0].per_epoch * S,
            loader(dataset, order=order).sources[0].per_epoch,
        )
        assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
        pairs = zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)
        for token, following in pairs:
            assert following == token + 1 if token not in lasts else following in firsts


def test_documents_and_windows_come_in_another_order_each_epoch_and_seed(dataset: TokenDataset, order: str) -> None:
    orders = {
        tuple(epoch_inputs(loader(dataset, seed, order=order), epoch).flatten().tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    first = epoch_inputs(loader(dataset, order=order), 0).flatten().tolist()
    assert first != sorted(first)


def test_each_epoch_puts_the_documents_together_anew(dataset: TokenDataset) -> None:
    lasts = {int(token) - 1 for token in 1000 + dataset.document_offsets[1:]}

    def neighbors(epoch: int) -> set[tuple[int, int]]:
        batches = loader(dataset)
        batch = batches.batch(epoch * batches.sources[0].per_epoch * S, batches.sources[0].per_epoch)
        pairs = zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)
        return {(token, following) for token, following in pairs if token in lasts}

    assert all(len(neighbors(epoch) - neighbors(epoch + 1)) > 3 for epoch in range(4))


def test_windows_side_by_side_are_not_visited_one_after_the_other(dataset: TokenDataset, order: str) -> None:
    for epoch in range(4):
        batches = loader(dataset, order=order)
        batch = batches.batch(epoch * batches.sources[0].per_epoch * S, batches.sources[0].per_epoch)
        follows = batch.labels[:-1, -1] == batch.input_ids[1:, 0]
        assert follows.sum() < batches.sources[0].per_epoch / 2


def test_an_order_is_a_permutation_and_never_changes_between_versions() -> None:
    assert shuffled(10, seed=42, epoch=1, purpose=0).tolist() == GOLDEN_ORDER
    for size in (1, 2, 1000):
        assert sorted(shuffled(size, 3, 1, 1)) == list(range(size))


def test_the_hash_gives_the_published_numbers() -> None:
    """First outputs of splitmix64 for the states 0 and 1234567, as other implementations have them."""
    states = np.array([0, 1234567], np.uint64)
    assert _splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_orders_are_fair() -> None:
    """Over many seeds each element comes first about equally often (chi-squared, 9 degrees of freedom)."""
    firsts = [int(shuffled(10, seed, 0, 0)[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 30


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**20))
def test_a_permutation_of_single_places_misses_none(size: int, seed: int, epoch: int) -> None:
    places = permuted(np.arange(size), size, seed, epoch, 1)
    assert sorted(places.tolist()) == list(range(size))
    some = np.arange(size)[::-7]
    assert permuted(some, size, seed, epoch, 1).tolist() == places[some].tolist()


def test_a_permutation_never_changes_between_versions() -> None:
    assert permuted(np.arange(10), 10, seed=42, epoch=1, purpose=0).tolist() == GOLDEN_PERMUTATION
    large = permuted(np.array([0, 1, 131_999_999]), 132_000_000, seed=42, epoch=1, purpose=0)
    assert large.tolist() == GOLDEN_PLACES


@pytest.mark.parametrize("size", [2**20 + 1, 1_500_000, 2**21])
def test_a_permutation_shuffles_as_well_as_chance(size: int) -> None:
    """Of a random permutation: neighbors are uncorrelated, places uniform, and one element in all stays on average."""
    places = permuted(np.arange(size), size, seed=3, epoch=0, purpose=1)
    z = np.corrcoef(places[:-1], places[1:])[0, 1] * np.sqrt(size)
    assert abs(z) < 4
    # Batches of 256: of 64 stretches of the data, how many windows of each are in a batch.
    batches = places[: size // 256 * 256].reshape(-1, 256)
    counts = np.stack([np.bincount(batch * 64 // size, minlength=64) for batch in batches[:2000]])
    chi_squared = ((counts - 4) ** 2 / 4).sum(1)  # 63 degrees of freedom
    assert abs(chi_squared.mean() - 63) < 4 * np.sqrt(2 * 63 / len(chi_squared))
    assert abs(chi_squared.var() / (2 * 63) - 1) < 0.15
    assert (places == np.arange(size)).sum() < 8
    assert (np.abs(np.diff(places)) == 1).sum() < 12  # 2 expected
    other = permuted(np.arange(size), size, seed=3, epoch=1, purpose=1)
    assert abs(np.corrcoef(places, other)[0, 1] * np.sqrt(size)) < 4


def test_firsts_of_permutations_are_fair() -> None:
    """Over many seeds each element comes first about equally often (chi-squared, 9 degrees of freedom)."""
    firsts = [int(permuted(np.array([0]), 10, seed, 0, 0)[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 30


def test_the_order_of_smaller_data_is_sorted_and_that_of_larger_data_is_not_held(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def windows(most: int | None) -> BatchLoader:
        return BatchLoader(dataset, seed=0, sequence_length=S, max_sorted_windows=most)

    per_epoch = loader(dataset).sources[0].per_epoch
    batches = {most: windows(most).batch(0, per_epoch).input_ids for most in (None, per_epoch, per_epoch - 1)}
    assert torch.equal(batches[None], batches[per_epoch])
    assert not torch.equal(batches[None], batches[per_epoch - 1])
    monkeypatch.setattr(loader_module, "shuffled", None)
    monkeypatch.setattr(TokenDataset, "document_offsets", None)
    assert len(windows(per_epoch - 1).batch(3 * per_epoch * S, 5)) == 5


def test_each_epoch_cuts_the_stored_tokens_at_other_places(dataset: TokenDataset) -> None:
    def cuts(epoch: int) -> frozenset[int]:
        return frozenset(epoch_inputs(loader(dataset, order="windows"), epoch)[:, 0].tolist())

    assert len({cuts(epoch) for epoch in range(8)}) > 5


def test_prefetched_batches_are_those_of_the_loader(dataset: TokenDataset, order: str) -> None:
    """In step, after a jump, over the ends of epochs, and for each rank."""
    plain = loader(dataset, within_documents=True, order=order)
    places = [0, 6 * S, 12 * S, 18 * S, 60 * S, 66 * S, 6 * S]
    for rank in range(2):
        prefetcher = Prefetcher(loader(dataset, within_documents=True, order=order), 6, rank, 2)
        for place in places:
            batch, expected = prefetcher.batch(place), plain.batch(place, 6, rank, 2)
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.position_ids, expected.position_ids)
        prefetcher.close()


def test_the_next_batch_is_made_while_this_one_is_used(dataset: TokenDataset) -> None:
    made: list[tuple[int, str]] = []
    batches = loader(dataset)
    make, ready = batches.batch, threading.Event()

    def spy(tokens_seen: int, *args: int) -> Batch:
        made.append((tokens_seen, threading.current_thread().name))
        if tokens_seen:
            ready.set()
        return make(tokens_seen, *args)

    batches.batch = spy
    prefetcher = Prefetcher(batches, 3)
    prefetcher.batch(0)
    assert ready.wait(10)
    assert [place for place, _ in made] == [0, 3 * S]
    assert made[1][1].startswith("prefetch")
    prefetcher.batch(3 * S)
    prefetcher.close()
    assert [place for place, _ in made][:3].count(3 * S) == 1


def test_an_error_in_the_background_reaches_the_caller(dataset: TokenDataset) -> None:
    batches = loader(dataset)
    prefetcher = Prefetcher(batches, 3)
    prefetcher.batch(0)
    prefetcher._next[1].result()
    batches.batch = None
    prefetcher.batch(3 * S)  # was made before
    with pytest.raises(TypeError):
        prefetcher.batch(6 * S)
    prefetcher.close()


def test_within_documents_positions_restart_and_no_document_predicts_the_next(
    dataset: TokenDataset, order: str
) -> None:
    windows = loader(dataset, order=order).sources[0].per_epoch
    plain = loader(dataset, order=order).batch(0, windows)
    batch = loader(dataset, within_documents=True, order=order).batch(0, windows)
    assert plain.position_ids is None
    assert torch.equal(plain.input_ids, batch.input_ids)
    firsts = {int(token) for token in 1000 + dataset.document_offsets[:-1]}
    for inputs, labels, positions, all_labels in zip(
        batch.input_ids.tolist(),
        batch.labels.tolist(),
        batch.position_ids.tolist(),
        plain.labels.tolist(),
        strict=True,
    ):
        expected = 0
        for place, token in enumerate(inputs):
            expected = 0 if token in firsts or place == 0 else expected + 1
            assert positions[place] == expected
            assert labels[place] == (IGNORE_INDEX if all_labels[place] in firsts else all_labels[place])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    sequence_length=st.integers(2, 7),
    batch_size=st.integers(1, 4),
    max_tokens=st.none() | st.integers(1, 40),
)
def test_validation_windows_cover_every_label_once_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None,
) -> None:
    tokens = np.arange(sum(lengths))
    dataset = _InMemory(tokens, np.cumsum([0, *lengths]))
    if len(tokens) < 2:
        with pytest.raises(DataError, match="two are needed"):
            next(validation_windows(dataset, sequence_length))
        return
    batches = list(validation_windows(dataset, sequence_length, max_tokens, batch_size=batch_size))
    assert all(batch.input_ids.shape == batch.labels.shape for batch in batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
    valid = labels != IGNORE_INDEX
    end = len(tokens) if max_tokens is None else min(len(tokens), max_tokens + 1)
    assert labels[valid].tolist() == tokens[1:end].tolist()
    assert inputs[valid].tolist() == tokens[: end - 1].tolist()
    within = validation_windows(dataset, sequence_length, max_tokens, batch_size=batch_size, within_documents=True)
    kept = torch.cat([batch.labels.flatten() for batch in within])
    assert set(labels.tolist()) - set(kept.tolist()) == set(dataset.document_offsets[1:-1].tolist()) & set(
        labels.tolist()
    )


class _InMemory:
    """What ``validation_windows`` needs of a data set, without files."""

    prepared_dir, split = "memory", "validation"

    def __init__(self, tokens: np.ndarray, document_offsets: np.ndarray) -> None:
        self.tokens, self.document_offsets, self.num_tokens = tokens, document_offsets, len(tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def test_a_data_set_of_one_window_is_enough_and_a_smaller_one_is_refused(
    make_dataset: Callable[..., TokenDataset],
) -> None:
    batches = loader(make_dataset([[1, 2], [3, 4, 5]]))
    batch = batches.batch(7 * S, 1)
    assert sorted(batch.input_ids[0].tolist() + batch.labels[0, -1:].tolist()) == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="4 train tokens, fewer than one window") as caught:
        loader(make_dataset([[1, 2], [3, 4]]))
    assert (caught.value.num_tokens, caught.value.sequence_length) == (4, S)


def test_a_changed_sequence_length_is_noticed(dataset: TokenDataset) -> None:
    with pytest.raises(DataError, match="tokens_seen=6 is not a multiple"):
        loader(dataset).batch(6, 1)


def test_a_batch_splits_into_micro_batches_and_moves_between_devices(dataset: TokenDataset) -> None:
    batch = loader(dataset, within_documents=True).batch(0, 5)
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in ("input_ids", "labels", "position_ids"):
        whole = getattr(batch, name)
        assert whole.dtype == torch.int64
        assert whole.shape == (5, S)
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
    moved = Batch(batch.input_ids, batch.labels).to("meta")
    assert moved.input_ids.is_meta
    assert moved.labels.is_meta
    assert moved.position_ids is None


def test_a_prefetcher_tells_how_long_it_was_waited_for(dataset: TokenDataset) -> None:
    prefetcher = Prefetcher(loader(dataset), 3)
    prefetcher.batch(0)
    assert prefetcher.seconds_waited > 0  # the first is made at once
    before = prefetcher.seconds_waited
    prefetcher._next[1].result()
    prefetcher.batch(3 * S)
    assert prefetcher.seconds_waited - before < before + 0.1
    prefetcher.close()
