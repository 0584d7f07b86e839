"""SCALE and its relatives: gradients with normalized rows or columns, and no state for a layer's matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steplm.errors import ConfigError
from steplm.optim.base import NamedParameters
from steplm.optim.matrix import UPDATE_RMS, Map, MatrixRule


def _normalize_(updates: Tensor, dim: int) -> None:
    """Divide by the RMS along ``dim``; zeros stay zeros."""
    norm = torch.linalg.vector_norm(updates, dim=dim, keepdim=True).mul_(updates.shape[dim] ** -0.5)
    updates.div_(norm.clamp_(min=torch.finfo(norm.dtype).tiny))


def _normalize_both_(updates: Tensor) -> None:
    _normalize_(updates, -1)
    _normalize_(updates, -2)


# For PyTorch's weights, (out_features, in_features). The paper writes them (in, out), so its columns are our rows.
NORMS: dict[str, Callable[[Tensor], object]] = {
    "column": lambda updates: _normalize_(updates, -1),
    "row": lambda updates: _normalize_(updates, -2),
    "both": _normalize_both_,
    "sign": Tensor.sign_,
}


class SCALE(MatrixRule):
    """SCALE (Glentis et al., arXiv 2506.16659): the gradient of each output feature, divided by its RMS.

    For a weight W (out_features, in_features) with gradient G:

        W  ←  (1 - lr × weight_decay) W - lr × 0.2 normalized(G)

    Every update has an RMS of 1 before the factor 0.2, which brings it to AdamW's RMS, so AdamW's learning rate is a
    good first guess. (The paper leaves the factor to the learning rate.) For the head, the paper normalizes the
    momentum instead of the gradient: M ← momentum × M + (1 - momentum) G.

    ``momentum_bytes`` gives the bytes of the states and ``scale_step_bytes`` those of the workspace, both in
    ``steplm.cost.formats``.

    Args:
        named_parameters, options: see ``MatrixRule``.
        momentum: 0, without state, for matrices in layers; 0.9 for the head in the paper.
        norm: ``column``: as in the paper. For embeddings (vocab_size, hidden_size), its authors' code normalizes along
            the other side, ``row``. ``both``: first ``column``, then ``row``. ``sign``: the sign of each element
            (Bernstein et al., arXiv 1802.04434).

    Raises:
        ConfigError: an unknown ``norm``, or a parameter or option that ``MatrixRule`` rejects.
    """

    def __init__(self, named_parameters: NamedParameters, *, norm: str = "column", **options: Any) -> None:
        if norm not in NORMS:
            raise ConfigError(f"no norm {norm!r}. Known: {', '.join(NORMS)}.", norm=norm)
        self.norm = norm
        super().__init__(named_parameters, **options)

    def _shards_rows(self) -> bool:
        return self.norm in ("column", "sign")

    def _update_maps(self, maps: list[Map], learning_rate: float, grad_scale: float) -> None:
        updates = self._gather(maps, grad_scale, nesterov=False, dtype=torch.float32)
        NORMS[self.norm](updates)
        self._descend(maps, updates, learning_rate, UPDATE_RMS)
