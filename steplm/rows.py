"""Which rows of a tensor are on this rank. Without torch: any tensor that can be sliced will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rows:
    """Part ``index`` of ``count`` parts of a tensor, cut along its first dimension.

    Every part has ⌈rows / count⌉ rows, but for the last ones, which may have fewer, or none: as ``torch.chunk`` and
    PyTorch's ``fully_shard`` cut.
    """

    index: int = 0
    count: int = 1

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    def of(self, num_rows: int) -> slice:
        """The rows of this part, of a tensor that has ``num_rows``."""
        each = -(-num_rows // self.count)
        return slice(min(self.index * each, num_rows), min((self.index + 1) * each, num_rows))

    def cut(self, tensor: Any) -> Any:
        """This part of a whole tensor, a copy; the tensor itself where there is one part."""
        return tensor if self.is_whole else tensor[self.of(len(tensor))].clone()  # a view would keep the whole alive


WHOLE = Rows()


def on_this_rank(tensor: Any) -> Any:
    """A sharded tensor's own rows; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
