"""Statistics of prepared documents: their lengths, and how a run's windows split them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from steplm.data.tokens import TokenDataset, documents_by_length
from steplm.units import format_count

BAR_WIDTH = 30  # characters


@dataclass(frozen=True)
class DocumentStatistics:
    """Statistics of one split's documents, in stored order and split into windows."""

    num_documents: int
    num_tokens: int
    sequence_length: int
    by_length: tuple[int, ...]  # documents of 1, 2 to 3, 4 to 7, ... tokens, including end of text
    longest: int  # tokens
    num_cut: int  # documents that span several windows
    num_inside: int  # documents that end inside a window, followed by the next one

    @property
    def num_windows(self) -> int:
        return (self.num_tokens - 1) // self.sequence_length


def document_statistics(dataset: TokenDataset, sequence_length: int) -> DocumentStatistics:
    """Compute the statistics from the document offsets, shard by shard."""
    by_length = np.zeros(64, np.int64)
    longest = num_cut = num_inside = 0
    for offsets in dataset.offsets_of_shards():
        starts, ends = offsets[:-1], offsets[1:]
        lengths = ends - starts
        counts = documents_by_length(offsets)
        by_length[: len(counts)] += counts
        longest = max(longest, int(lengths.max()))
        num_cut += int((starts // sequence_length != (ends - 1) // sequence_length).sum())
        num_inside += int((ends % sequence_length != 0).sum())
    filled = int(np.flatnonzero(by_length)[-1]) + 1 if by_length.any() else 0
    counts = tuple(by_length[:filled].tolist())
    return DocumentStatistics(
        dataset.num_documents, dataset.num_tokens, sequence_length, counts, longest, num_cut, num_inside
    )


def described(statistics: DocumentStatistics) -> Iterator[str]:
    """Yield lines for a terminal: a histogram of lengths, and the effect of the windows."""
    of_all = max(statistics.num_documents, 1)
    for power, count in enumerate(statistics.by_length):
        if not any(statistics.by_length[: power + 1]):
            continue
        lengths = f"{2**power:,} to {min(2 ** (power + 1) - 1, statistics.longest):,}"
        bar = "█" * round(BAR_WIDTH * count / max(statistics.by_length))
        yield f"  {lengths:>20} tokens  {count / of_all:6.1%}  {bar}".rstrip()
    length, num_windows = statistics.sequence_length, max(statistics.num_windows, 1)
    unused = statistics.num_tokens - 1 - statistics.num_windows * length
    yield (
        f"  {format_count(statistics.num_windows)} windows of {length:,} tokens: no padding, "
        f"{statistics.num_inside / num_windows:.1f} documents end inside each, "
        f"{statistics.num_cut / of_all:.1%} of documents are cut, {unused:,} tokens left over per epoch"
    )
