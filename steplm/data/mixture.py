"""The source of each sequence of a mixture, and how often each source is repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import numpy as np
import numpy.typing as npt

from steplm.data.tokens import Manifest

PERIOD = 10_000  # sequences after which the order of sources repeats, so shares are exact to 0.01%
# Up to four epochs, repeated tokens are worth almost as much as new ones (Muennighoff et al., "Scaling data-constrained
# language models", 2023).
MAX_EPOCHS = 4.0

Array = npt.NDArray[np.int64]


class Mixture:
    """An order of sources in which any run of sequences matches each source's share to within two sequences.

    The algorithm is Tijdeman's ("The chairman assignment problem", 1980): after any number of sequences, each source is
    less than one sequence ahead of or behind its share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = np.array(whole_shares(weights), np.int64)  # sequences of each source per period
        self.period = int(self.counts.sum())
        self._sources = np.array(_tijdeman(self.counts.tolist()), np.int64)
        self._places = np.empty(self.period, np.int64)  # earlier sequences of the same source in the period
        for source, count in enumerate(self.counts):
            self._places[self._sources == source] = np.arange(count)

    def locate(self, indices: Array) -> tuple[Array, Array]:
        """The source of each sequence of the mixture, and its index among the sequences of that source."""
        periods, offsets = np.divmod(indices, self.period)
        sources = self._sources[offsets]
        return sources, periods * self.counts[sources] + self._places[offsets]


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of the weights, in lowest terms, with a sum of at most ``PERIOD``.

    Each is at least 1. Leftover units go to the largest remainders first.
    """
    exact = [weight / sum(weights) * PERIOD for weight in weights]
    shares = [max(int(share), 1) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: max(PERIOD - sum(shares), 0)]:
        shares[index] += 1
    shares[shares.index(max(shares))] -= max(sum(shares) - PERIOD, 0)
    return [share // gcd(*shares) for share in shares]


def _tijdeman(counts: Sequence[int]) -> list[int]:
    period, bound = sum(counts), max(2 * len(counts) - 2, 1)
    used = [0] * len(counts)
    order = []
    for number in range(1, period + 1):
        # How many sequences each source is behind its share, times the period.
        behind = [count * number - period * done for count, done in zip(counts, used, strict=True)]
        able = [source for source, lag in enumerate(behind) if bound * lag >= period or len(counts) == 1]
        first = min(able, key=lambda source: ((bound - 1) * period - bound * behind[source]) / counts[source])
        used[first] += 1
        order.append(first)
    return order


def epochs(manifest: Manifest, weights: Mapping[str, float], total_tokens: int) -> dict[str, float]:
    """The number of epochs of each training source, by name, in a run of ``total_tokens``.

    Args:
        weights: ``data.weights`` of the run; empty if there is only one source.
    """
    splits = manifest.splits_of("train")
    shares = whole_shares([weights.get(split, 1.0) for split in splits.values()])
    return {
        name: total_tokens * share / sum(shares) / max(manifest.split(split).num_tokens, 1)
        for (name, split), share in zip(splits.items(), shares, strict=True)
    }


def told_epochs(epochs_of_sources: Mapping[str, float]) -> str:
    """Text such as ``3.1 epochs``, or ``epochs: web 0.8, code 3.1`` for a mixture."""
    if len(epochs_of_sources) == 1:
        return f"{next(iter(epochs_of_sources.values())):.1f} epochs"
    return "epochs: " + ", ".join(f"{name} {count:.1f}" for name, count in epochs_of_sources.items())


def repetition_warnings(epochs_of_sources: Mapping[str, float]) -> list[str]:
    """A warning for each source that is repeated more than ``MAX_EPOCHS`` times."""
    return [
        f"{name} is repeated {count:.1f} times; beyond {MAX_EPOCHS:g} epochs repeated tokens teach little. "
        "Lower its weight, or add text"
        for name, count in epochs_of_sources.items()
        if count > MAX_EPOCHS
    ]
