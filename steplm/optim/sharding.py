"""Gathers matrices whose rows are sharded over ranks, so that an update can use them whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Sharding(NamedTuple):
    """Ranks that share the rows of every matrix: ⌈rows / num_shards⌉ each, the last ones fewer or none."""

    group: Any  # dist.ProcessGroup, which is missing in PyTorch builds without distributed
    num_shards: int

    def padded(self, num_matrices: int, shape: torch.Size) -> tuple[int, int, int]:
        """Shape of the input of ``gather`` for ``num_matrices`` matrices of this shape."""
        rows, columns = shape
        return -(-num_matrices // self.num_shards) * self.num_shards, -(-rows // self.num_shards), columns

    def gather(self, shares: Tensor) -> Tensor:
        """Give each rank its share of the matrices, unsharded: one of every ``num_shards``.

        Args:
            shares: (matrices, rows, columns), this rank's rows of each matrix, zero-padded to the same number of rows
                on every rank and to a multiple of ``num_shards`` matrices.

        Returns:
            A new tensor (matrices / num_shards, num_shards × rows, columns).
        """
        matrices, rows, columns = shares.shape
        whole = shares.new_empty((matrices // self.num_shards, self.num_shards * rows, columns))
        self._exchange(whole, shares)
        return whole

    def scatter(self, whole: Tensor) -> Tensor:
        """The inverse of ``gather``: (matrices, rows, columns), this rank's rows of each matrix."""
        count, rows, columns = whole.shape
        shares = whole.new_empty((count * self.num_shards, rows // self.num_shards, columns))
        self._exchange(shares, whole)
        return shares

    def _exchange(self, received: Tensor, sent: Tensor) -> None:
        # One call per matrix that a rank receives: its rows then arrive in order and need no copy.
        count = min(len(received), len(sent))
        for into, out_of in zip(received.view(count, -1), sent.view(count, -1), strict=True):
            dist.all_to_all_single(into, out_of, group=self.group)


def sharding(parameter: Tensor) -> Sharding | None:
    """The ranks that share the rows of a matrix; None if this rank has all of them, or whole experts of a stack."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or parameter.ndim != 2:
        return None
    placements: Any = parameter.placements  # type: ignore[attr-defined]
    for dim, placement in enumerate(placements):
        if placement.is_shard() and mesh.size(dim) > 1:
            return Sharding(mesh.get_group(dim), mesh.size(dim))
    return None
