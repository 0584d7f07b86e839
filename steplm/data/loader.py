"""Token shards -> batches, as a pure function of (seed, tokens seen, rank, world size).

An epoch is split into windows of ``sequence_length`` inputs, whose labels are the next tokens, and visits each window
once. There are two orders:

``documents``, for smaller data: the documents are concatenated in a shuffled order and split into windows, and the
windows are visited in a second shuffled order. Both orders are sorted in memory.

``windows``, for larger data: the documents stay in stored order and form a circle, whose split into windows starts at
another position in each epoch. The windows are visited in the order of a permutation that is computed index by index.
Access to any position of any epoch takes the same time, and nothing is kept in memory.

A mixture draws its sequences from several data sets in the order given by ``Mixture``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steplm.config import RunConfig
from steplm.data.mixture import Mixture
from steplm.data.tokens import TokenDataset
from steplm.errors import DataError

# B sequences, S positions

IGNORE_INDEX = -100  # label without a loss, in Hugging Face models and torch
_DOCUMENT_ORDER, _WINDOW_ORDER, _FIRST_CUT = 0, 1, 2
MAX_SORTED_WINDOWS = 2**20  # most windows per epoch for the order ``documents``
FEISTEL_ROUNDS = 8

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """(B, S) int64 tensors; ``labels`` are already shifted: the token that follows each input, or -100."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None  # restart at each document; None: 0 ... S-1
    source_ids: Tensor | None = None  # (B,) int64, for a mixture: index of each sequence's source

    def __len__(self) -> int:
        return len(self.input_ids)

    def split(self, micro_batch_size: int) -> Iterator[Batch]:
        """Yield consecutive micro-batches of at most ``micro_batch_size`` sequences."""
        for start in range(0, len(self), micro_batch_size):
            part = slice(start, start + micro_batch_size)
            yield self._each(lambda tensor, part=part: tensor[part])  # type: ignore[misc]

    def to(self, device: torch.device | str) -> Batch:
        """Move to ``device``; a pinned batch is copied asynchronously."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """Copy to pinned memory, which a CUDA device can read directly."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        positions, sources = (None if t is None else change(t) for t in (self.position_ids, self.source_ids))
        return Batch(change(self.input_ids), change(self.labels), positions, sources)


class BatchLoader:
    """Batches of training windows from one data set or a mixture of several.

    Args:
        dataset: one data set, or those of a mixture.
        weights: weights of a mixture; a data set's share of the sequences is its weight over the sum of all.
        seed: seed of the orders of documents and windows, which differ for each epoch of each data set.
        sequence_length: inputs per sequence.
        within_documents: restart position IDs at each document, and never use the first token of a document as
            a label. Together with attention within documents, no token is predicted from another document.
        max_sorted_windows: data sets with more windows per epoch use the order ``windows``; None: none does. A
            resumed run must pass the value it started with.

    Raises:
        DataError: a data set is shorter than one window.
    """

    def __init__(
        self,
        dataset: TokenDataset | Sequence[TokenDataset],
        *,
        seed: int,
        sequence_length: int,
        weights: Sequence[float] = (1.0,),
        within_documents: bool = False,
        max_sorted_windows: int | None = MAX_SORTED_WINDOWS,
    ) -> None:
        datasets = [dataset] if isinstance(dataset, TokenDataset) else list(dataset)
        self.sequence_length = sequence_length
        self.within_documents = within_documents
        self.sources = [
            _Windows(dataset, seed, sequence_length, within_documents, max_sorted_windows) for dataset in datasets
        ]
        self.mixture = Mixture(weights) if len(datasets) > 1 else None

    def batch(self, tokens_seen: int, num_sequences: int, rank: int = 0, world_size: int = 1) -> Batch:
        """This rank's part of the global batch that starts after ``tokens_seen`` tokens.

        Concatenated in rank order, the parts are the same global batch for any world size.

        Args:
            tokens_seen: input tokens seen on all ranks, a multiple of the sequence length.
            num_sequences: sequences in the global batch.
        """
        first, remainder = divmod(tokens_seen, self.sequence_length)
        if remainder:
            raise DataError(
                f"tokens_seen={tokens_seen:,} is not a multiple of "
                f"train.sequence_length={self.sequence_length}: "
                "the sequence length changed during the run. Restore the old value.",
                tokens_seen=tokens_seen,
                sequence_length=self.sequence_length,
            )
        part = np.arange(first + rank * num_sequences // world_size, first + (rank + 1) * num_sequences // world_size)
        if self.mixture is None:
            return _to_batch(self.sources[0].read(part), self.sequence_length, self.within_documents)
        source_ids, places = self.mixture.locate(part)
        of_source = [iter(source.read(places[source_ids == index])) for index, source in enumerate(self.sources)]
        windows = [next(of_source[index]) for index in source_ids]
        batch = _to_batch(windows, self.sequence_length, self.within_documents)
        return replace(batch, source_ids=torch.from_numpy(source_ids))


def training_loader(config: RunConfig) -> BatchLoader:
    """The batch loader of a run on its prepared data.

    Raises:
        DataError: the data is not prepared, damaged, or shorter than one window.
    """
    weights = config.data.weights or {"train": 1.0}
    return BatchLoader(
        [TokenDataset(config.prepared_dir, split) for split in weights],
        weights=list(weights.values()),
        seed=config.seed,
        sequence_length=config.train.sequence_length,
        within_documents=config.data.within_documents,
    )


class Prefetcher:
    """Prepares one rank's next batch in a background thread while the current step runs.

    The batches are those of ``loader.batch``. A batch out of sequence is not prefetched but built on request.

    Args:
        num_sequences, rank, world_size: as for ``BatchLoader.batch``.
        pin_memory: put batches in pinned memory, which a CUDA device copies from without the CPU.
    """

    def __init__(
        self,
        loader: BatchLoader,
        num_sequences: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        pin_memory: bool = False,
    ) -> None:
        self.loader = loader
        self.num_sequences, self.rank, self.world_size = num_sequences, rank, world_size
        self.pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future[Batch]] | None = None
        self.seconds_waited = 0.0  # total time spent in ``batch``

    def batch(self, tokens_seen: int) -> Batch:
        """This rank's part of the global batch that starts after ``tokens_seen`` tokens."""
        began = time.perf_counter()
        expected, self._next = self._next, None
        batch = expected[1].result() if expected and expected[0] == tokens_seen else self._make(tokens_seen)
        following = tokens_seen + self.num_sequences * self.loader.sequence_length
        self._next = following, self._pool.submit(self._make, following)
        self.seconds_waited += time.perf_counter() - began
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _make(self, tokens_seen: int) -> Batch:
        batch = self.loader.batch(tokens_seen, self.num_sequences, self.rank, self.world_size)
        return batch.pin_memory() if self.pin_memory else batch


@dataclass(frozen=True)
class _Window:
    tokens: Array  # inputs, and the label of the last one
    document_starts: Array  # positions in ``tokens`` where a document starts


class _Windows:
    """The windows of one data set, numbered consecutively across epochs."""

    def __init__(
        self,
        dataset: TokenDataset,
        seed: int,
        sequence_length: int,
        within_documents: bool,
        max_sorted_windows: int | None,
    ) -> None:
        self.sequence_length = sequence_length
        # The last token of an epoch is only a label; leftover tokens that do not fill a window are dropped.
        self.per_epoch = (dataset.num_tokens - 1) // sequence_length
        if self.per_epoch < 1:
            raise DataError(
                f"{dataset.prepared_dir} has {dataset.num_tokens:,} {dataset.split} tokens, "
                f"fewer than one window of train.sequence_length={sequence_length} + 1. "
                "Add text, or lower train.sequence_length.",
                num_tokens=dataset.num_tokens,
                sequence_length=sequence_length,
            )
        is_sorted = max_sorted_windows is None or self.per_epoch <= max_sorted_windows
        kind = _SortedEpoch if is_sorted else partial(_PermutedEpoch, within_documents=within_documents)
        self._make_epoch = partial(kind, dataset, seed, sequence_length)
        self._last_epoch: _SortedEpoch | _PermutedEpoch | None = None

    def read(self, indices: Array) -> list[_Window]:
        epochs, places = np.divmod(indices, self.per_epoch)
        windows: list[_Window] = []
        for number in np.unique(epochs).tolist():
            epoch = self._epoch(number)
            for start in epoch.window_starts(places[epochs == number]).tolist():
                windows.append(epoch.read(start, start + self.sequence_length + 1))
        return windows

    def _epoch(self, number: int) -> _SortedEpoch | _PermutedEpoch:
        # A local variable, because a prefetching thread may be in another epoch.
        epoch = self._last_epoch
        if epoch is None or epoch.number != number:
            epoch = self._last_epoch = self._make_epoch(number)
        return epoch


class _SortedEpoch:
    """The order ``documents``; documents are found by binary search and not copied."""

    def __init__(self, dataset: TokenDataset, seed: int, sequence_length: int, number: int) -> None:
        self.dataset = dataset
        self.number = number
        self.sequence_length = sequence_length
        self.window_order = shuffled((dataset.num_tokens - 1) // sequence_length, seed, number, _WINDOW_ORDER)
        self.document_order = shuffled(dataset.num_documents, seed, number, _DOCUMENT_ORDER)
        # Position in the epoch where each document of the order starts, and the end of the last.
        self.starts = np.concatenate(([0], np.cumsum(dataset.document_lengths[self.document_order])))

    def window_starts(self, places: Array) -> Array:
        """Starts of the windows that are visited at these positions in the epoch."""
        return self.window_order[places] * self.sequence_length

    def read(self, start: int, stop: int) -> _Window:
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        offsets = self.dataset.document_offsets
        parts = []
        for place in range(first, last):
            origin = int(offsets[self.document_order[place]]) - int(self.starts[place])
            begin, end = max(start, int(self.starts[place])), min(stop, int(self.starts[place + 1]))
            parts.append(self.dataset.read(origin + begin, origin + end))
        starts = self.starts[first:last] - start
        return _Window(np.concatenate(parts).astype(np.int64), starts[starts >= 0])


class _PermutedEpoch:
    """The order ``windows``: a circle of the stored tokens, which each epoch splits from its own start position."""

    def __init__(
        self, dataset: TokenDataset, seed: int, sequence_length: int, number: int, *, within_documents: bool
    ) -> None:
        self.dataset = dataset
        self.seed, self.number = seed, number
        self.sequence_length, self.within_documents = sequence_length, within_documents
        self.num_windows = (dataset.num_tokens - 1) // sequence_length
        self.first_cut = int(_hash_of(seed, number, _FIRST_CUT)[0]) % dataset.num_tokens

    def window_starts(self, places: Array) -> Array:
        windows = permuted(places, self.num_windows, self.seed, self.number, _WINDOW_ORDER)
        return (self.first_cut + windows * self.sequence_length) % self.dataset.num_tokens

    def read(self, start: int, stop: int) -> _Window:
        end = self.dataset.num_tokens
        ranges = [(start, stop)] if stop <= end else [(start, end), (0, stop - end)]
        tokens = np.concatenate([self.dataset.read(*part) for part in ranges]).astype(np.int64)
        starts = np.empty(0, np.int64)
        if self.within_documents:
            starts = np.concatenate([self.dataset.document_starts(*part) for part in ranges])
        return _Window(tokens, (starts - start) % end)


def shuffled(size: int, seed: int, epoch: int, purpose: int) -> Array:
    """``range(size)`` sorted by a hash (splitmix64), an order that does not depend on library versions."""
    hashes = _splitmix64(np.arange(size, dtype=np.uint64) ^ _hash_of(seed, epoch, purpose))
    return np.argsort(hashes, kind="stable")


def permuted(indices: Array, size: int, seed: int, epoch: int, purpose: int) -> Array:
    """Images of ``indices`` under a pseudorandom permutation of ``range(size)``, without computing the rest of it.

    A Feistel network (Luby and Rackoff, 1988) permutes the numbers below the next power of two. Results of ``size`` or
    more go through it again ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), less
    than once on average.
    """
    num_bits = max((size - 1).bit_length(), 2)
    low_bits = np.uint64(num_bits // 2)
    low_mask, high_mask = np.uint64(2 ** (num_bits // 2) - 1), np.uint64(2 ** (num_bits - num_bits // 2) - 1)
    keys = _splitmix64(np.arange(FEISTEL_ROUNDS, dtype=np.uint64) ^ _hash_of(seed, epoch, purpose))
    values = indices.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        low, high = values[walking] & low_mask, values[walking] >> low_bits
        for low_key, high_key in keys.reshape(-1, 2):
            high ^= _splitmix64(low ^ low_key) & high_mask
            low ^= _splitmix64(high ^ high_key) & low_mask
        values[walking] = high << low_bits | low
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)


def _hash_of(*values: int) -> npt.NDArray[np.uint64]:
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _splitmix64(state ^ np.uint64(value))
    return state


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def validation_windows(
    dataset: TokenDataset,
    sequence_length: int,
    max_tokens: int | None = None,
    *,
    batch_size: int = 1,
    within_documents: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield consecutive windows in stored order, so that every token except the first is a label exactly once.

    The last window is padded with labels of -100. With ``within_documents``, the first token of each document
    is not used as a label.

    Args:
        max_tokens: maximum number of labels, from the start; None: all.
        rank, world_size: this rank gets every ``world_size``-th batch. All ranks get the same number of batches; the
            last ones may have no labels.

    Raises:
        DataError: the data set has fewer than two tokens.
    """
    if dataset.num_tokens < 2:
        raise DataError(f"{dataset.prepared_dir} has {dataset.num_tokens} {dataset.split} tokens; two are needed.")
    end = dataset.num_tokens if max_tokens is None else min(dataset.num_tokens, max_tokens + 1)
    offsets = dataset.document_offsets

    def window(start: int) -> _Window:
        stop = min(start + sequence_length + 1, end)
        starts = offsets[np.searchsorted(offsets, start) : np.searchsorted(offsets, stop)] - start
        return _Window(dataset.read(start, stop).astype(np.int64), starts)

    batch_tokens = batch_size * sequence_length
    num_batches = -(-(end - 1) // batch_tokens)
    for index in range(rank, -(-num_batches // world_size) * world_size, world_size):
        # Past the end there is nothing to predict, but every rank must take part in every forward pass.
        first = min(index, num_batches - 1) * batch_tokens
        starts = range(first, min(first + batch_tokens, end - 1), sequence_length)
        batch = _to_batch([window(start) for start in starts], sequence_length, within_documents)
        yield batch if index < num_batches else replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))


def _to_batch(windows: list[_Window], sequence_length: int, within_documents: bool) -> Batch:
    shape = (len(windows), sequence_length)
    input_ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    position_ids = np.tile(np.arange(sequence_length), (len(windows), 1)) if within_documents else None
    for row, window in enumerate(windows):
        length = len(window.tokens) - 1
        input_ids[row, :length], labels[row, :length] = window.tokens[:-1], window.tokens[1:]
        if position_ids is not None:
            labels[row, window.document_starts[window.document_starts > 0] - 1] = IGNORE_INDEX
            begins = np.zeros(sequence_length, np.int64)
            starts = window.document_starts[window.document_starts < sequence_length]
            begins[starts] = starts
            position_ids[row] -= np.maximum.accumulate(begins)
    positions = None if position_ids is None else torch.from_numpy(position_ids)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), positions)
