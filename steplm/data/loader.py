"""Token shards -> batches, as a pure function of (seed, tokens seen, rank, world size).

An epoch: the documents in a shuffled order, put end to end, cut into windows of ``sequence_length`` inputs
whose labels are the tokens that follow, and the windows visited in a second shuffled order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steplm.data.tokens import TokenDataset
from steplm.errors import DataError

# B sequences, S positions

IGNORE_INDEX = -100  # a label that does not count, in Hugging Face models and torch
_DOCUMENT_ORDER, _WINDOW_ORDER = 0, 1

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """(B, S) int64 tensors; ``labels`` are shifted already: the token that follows each input, or -100."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None  # restart at each document; None: 0 ... S-1

    def __len__(self) -> int:
        return len(self.input_ids)

    def split(self, micro_batch_size: int) -> Iterator[Batch]:
        """Consecutive parts of at most ``micro_batch_size`` sequences."""
        for start in range(0, len(self), micro_batch_size):
            part = slice(start, start + micro_batch_size)
            positions = None if self.position_ids is None else self.position_ids[part]
            yield Batch(self.input_ids[part], self.labels[part], positions)

    def to(self, device: torch.device | str) -> Batch:
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(self.input_ids.to(device), self.labels.to(device), positions)


class BatchLoader:
    """Batches of training windows.

    Args:
        seed: of the orders of documents and windows; each epoch has its own orders.
        sequence_length: inputs per sequence.
        within_documents: position ids restart at each document, and the first token of a document is never
            a label, so that with attention kept inside documents none is predicted from another.

    Raises:
        DataError: the data set is shorter than one window.
    """

    def __init__(
        self, dataset: TokenDataset, *, seed: int, sequence_length: int, within_documents: bool = False
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.sequence_length = sequence_length
        self.within_documents = within_documents
        # The last token of an epoch is a label only, and what does not fill a window is left out.
        self.windows_per_epoch = (dataset.num_tokens - 1) // sequence_length
        if self.windows_per_epoch < 1:
            raise DataError(
                f"{dataset.prepared_dir} has {dataset.num_tokens:,} {dataset.split} tokens, "
                f"fewer than one window of train.sequence_length={sequence_length} + 1. "
                "Add text, or lower train.sequence_length.",
                num_tokens=dataset.num_tokens,
                sequence_length=sequence_length,
            )
        self._epoch: _Epoch | None = None

    def batch(self, tokens_seen: int, num_sequences: int, rank: int = 0, world_size: int = 1) -> Batch:
        """This rank's part of the global batch that starts after ``tokens_seen`` tokens.

        The parts of all ranks, in order, are the global batch, whatever the world size.

        Args:
            tokens_seen: input tokens seen over all ranks, a multiple of the sequence length.
            num_sequences: sequences in the global batch.
        """
        first, remainder = divmod(tokens_seen, self.sequence_length)
        if remainder:
            raise DataError(
                f"tokens_seen={tokens_seen:,} is not a multiple of "
                f"train.sequence_length={self.sequence_length}: "
                "the sequence length changed during the run. Go on with the old one.",
                tokens_seen=tokens_seen,
                sequence_length=self.sequence_length,
            )
        part = range(first + rank * num_sequences // world_size, first + (rank + 1) * num_sequences // world_size)
        return _to_batch([self._window(index) for index in part], self.sequence_length, self.within_documents)

    def _window(self, index: int) -> _Window:
        number, place = divmod(index, self.windows_per_epoch)
        if self._epoch is None or self._epoch.number != number:
            self._epoch = _Epoch(self.dataset, self.seed, number, self.windows_per_epoch)
        start = int(self._epoch.window_order[place]) * self.sequence_length
        return self._epoch.read(start, start + self.sequence_length + 1)


@dataclass(frozen=True)
class _Window:
    tokens: Array  # inputs, and the label of the last
    document_starts: Array  # places in ``tokens`` at which a document begins


class _Epoch:
    """The documents of one epoch end to end, in its order; found by binary search, nothing copied."""

    def __init__(self, dataset: TokenDataset, seed: int, number: int, num_windows: int) -> None:
        self.dataset = dataset
        self.number = number
        self.window_order = shuffled(num_windows, seed, number, _WINDOW_ORDER)
        self.document_order = shuffled(dataset.num_documents, seed, number, _DOCUMENT_ORDER)
        # Place in the epoch at which each document of the order starts, and the end of the last.
        self.starts = np.concatenate(([0], np.cumsum(dataset.document_lengths[self.document_order])))

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


def shuffled(size: int, seed: int, epoch: int, purpose: int) -> Array:
    """``range(size)`` sorted by a hash (splitmix64): an order that no library version can change."""
    state = np.zeros(1, np.uint64)
    for value in (seed, epoch, purpose):
        state = _splitmix64(state ^ np.uint64(value))
    return np.argsort(_splitmix64(np.arange(size, dtype=np.uint64) ^ state), kind="stable")


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
    """Windows side by side, in the documents' order: every token but the first is a label exactly once.

    The last window is padded with labels of -100. With ``within_documents`` the first token of each document
    is no label.

    Args:
        max_tokens: labels at most, from the front; ``None``: all.
        rank, world_size: this rank's share, every so many batches. Each rank gets as many, the last ones of which
            may have no label.

    Raises:
        DataError: fewer than two tokens.
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
        # Past the end there is nothing to predict, but every rank takes part in every forward pass.
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
