"""The rows of a tensor on this rank; independent of torch, for any tensor that can be sliced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rows:
    """Chunk ``index`` of the ``count`` chunks of a tensor along its first dimension.

    Every chunk has ⌈rows / count⌉ rows, except the last ones, which may have fewer or none, as in ``torch.chunk`` and
    PyTorch's ``fully_shard``.
    """

    index: int = 0
    count: int = 1

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    def of(self, num_rows: int) -> slice:
        """The rows of this chunk in a tensor with ``num_rows`` rows."""
        each = -(-num_rows // self.count)
        return slice(min(self.index * each, num_rows), min((self.index + 1) * each, num_rows))

    def cut(self, tensor: Any) -> Any:
        """A copy of this chunk of a full tensor; the tensor itself if there is only one chunk."""
        return tensor if self.is_whole else tensor[self.of(len(tensor))].clone()  # a view would keep all rows alive


WHOLE = Rows()


def on_this_rank(tensor: Any) -> Any:
    """The local rows of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
