"""Matrices whose rows are shared by ranks, made whole for an update."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Sharding(NamedTuple):
    """Ranks that share the rows of every matrix, ⌈rows / num_shards⌉ each, the last ones fewer or none."""

    group: Any  # dist.ProcessGroup, which a build of PyTorch without distributed lacks
    num_shards: int

    def padded(self, num_matrices: int, shape: torch.Size) -> tuple[int, int, int]:
        """Shape of what ``gather`` takes of so many matrices of this shape."""
        rows, columns = shape
        return -(-num_matrices // self.num_shards) * self.num_shards, -(-rows // self.num_shards), columns

    def gather(self, shares: Tensor) -> Tensor:
        """Each rank receives its share of the matrices, whole: of every ``num_shards`` one.

        Args:
            shares: (matrices, rows, columns), what this rank has of each, filled up with zeros to the same number of
                rows on every rank, and to a multiple of ``num_shards`` matrices.

        Returns:
            (matrices / num_shards, num_shards × rows, columns), new.
        """
        matrices, rows, columns = shares.shape
        whole = shares.new_empty((matrices // self.num_shards, self.num_shards * rows, columns))
        self._exchange(whole, shares)
        return whole

    def scatter(self, whole: Tensor) -> Tensor:
        """The reverse of ``gather``: (matrices, rows, columns), what this rank has of each."""
        count, rows, columns = whole.shape
        shares = whole.new_empty((count * self.num_shards, rows // self.num_shards, columns))
        self._exchange(shares, whole)
        return shares

    def _exchange(self, received: Tensor, sent: Tensor) -> None:
        # One call for each matrix that a rank holds: its rows arrive in their order, and need no copy.
        count = min(len(received), len(sent))
        for into, out_of in zip(received.view(count, -1), sent.view(count, -1), strict=True):
            dist.all_to_all_single(into, out_of, group=self.group)


def sharding(parameter: Tensor) -> Sharding | None:
    """The ranks that share the rows of a matrix; None where this one has all of them, or whole experts of a stack."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or parameter.ndim != 2:
        return None
    placements: Any = parameter.placements  # type: ignore[attr-defined]
    for dim, placement in enumerate(placements):
        if placement.is_shard() and mesh.size(dim) > 1:
            return Sharding(mesh.get_group(dim), mesh.size(dim))
    return None
