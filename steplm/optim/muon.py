"""Muon: momentum, orthogonalized before it is subtracted from the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steplm.cost.formats import NEWTON_SCHULZ_STEPS, NO_BLOCKS, RowBlocks
from steplm.optim.base import NamedParameters
from steplm.optim.matrix import UPDATE_RMS, Map, MatrixRule
from steplm.optim.sharding import sharding
from steplm.rows import on_this_rank

# Coefficients of Newton–Schulz's quintic polynomial, chosen by Keller Jordan for a steep slope at 0.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # lower bound on the norm that a matrix is divided by


class Muon(MatrixRule):
    """Muon (Keller Jordan, 2024) with the scaling of Liu et al. (arXiv 2502.16982), for the linear weights of layers.

    For each weight matrix W of shape (rows, columns), with gradient G and momentum M:

        M  ←  0.95 M + 0.05 G
        U  =  0.95 M + 0.05 G                            Nesterov's look-ahead
        O  =  NewtonSchulz(U)                            close to the nearest matrix with orthonormal rows or columns
        W  ←  (1 - lr × weight_decay) W - lr × 0.2 √max(rows, columns) O

    The last factor gives the update AdamW's RMS, so AdamW's learning rate and weight decay carry over. As long as all
    gradients of a matrix have been zero, only weight decay changes it.

    Newton–Schulz runs in bf16 on CUDA and in fp32 elsewhere, with the smaller side as rows. ``step`` runs it on several
    matrices of one shape at once, ``in_backward`` on those of one parameter. Matrices in host memory are sent to
    ``compute_device`` for it. Ranks that share the rows of matrices each gather different whole matrices, then send the
    rows of the updates back. ``momentum_bytes`` gives the bytes of the momentum and ``muon_step_bytes`` those of the
    workspace, both in ``steplm.cost.formats``. 8-bit momentum: arXiv 2509.23106.

    Args:
        named_parameters, options: see ``MatrixRule``.
        momentum: coefficient of the old momentum in the new one, and of the momentum in the look-ahead.
        compute_dtype: dtype of Newton–Schulz. None: bf16 on CUDA, fp32 elsewhere.
        row_blocks: (rows, columns) of a fused matrix -> rows of each map in it, from the top; each is updated as if it
            were a parameter of its own.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        momentum: float = 0.95,
        compute_dtype: torch.dtype | None = None,
        row_blocks: RowBlocks = NO_BLOCKS,
        **options: Any,
    ) -> None:
        super().__init__(named_parameters, momentum=momentum, **options)
        self.compute_dtype, self.row_blocks = compute_dtype, row_blocks

    def _update_maps(self, maps: list[Map], learning_rate: float, grad_scale: float) -> None:
        parameter = self.parameters[maps[0].name]
        rows, columns = parameter.shape[-2:]
        device = self.compute_device or parameter.device
        dtype = self.compute_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        shared = sharding(parameter)
        updates = self._gather(maps, grad_scale, nesterov=True, dtype=dtype, shared=shared).to(device)
        if shared:
            updates = shared.gather(updates)
        if blocks := self.row_blocks.get((rows, columns)):
            for block in updates[:, :rows].split(blocks, dim=1):
                factor = math.sqrt(max(block.shape[1:]) / max(rows, columns))  # relative to that of the fused matrix
                block.copy_(orthogonalized([block])).mul_(factor)
        else:
            held = [updates]
            del updates
            updates = orthogonalized(held)
        if shared:
            updates = updates.contiguous()
            updates = shared.scatter(updates)[: len(maps), : len(on_this_rank(parameter))]
        self._descend(maps, updates.to(parameter.device), learning_rate, UPDATE_RMS * math.sqrt(max(rows, columns)))


def orthogonalized(held: list[Tensor]) -> Tensor:
    """Matrices with the singular vectors of those given, and singular values near 1.

    Args:
        held: a tensor (batch, rows, columns), which is taken out of the list to free its memory after the first step.
    """
    matrices = held.pop()
    is_tall = matrices.shape[1] > matrices.shape[2]
    matrices = matrices.mT if is_tall else matrices
    matrices.div_(torch.linalg.matrix_norm(matrices, keepdim=True).clamp_(min=EPS))
    for _ in range(NEWTON_SCHULZ_STEPS):
        matrices = newton_schulz_step(matrices)
    return matrices.mT if is_tall else matrices


def newton_schulz_step(matrices: Tensor) -> Tensor:
    """One step toward matrices with all singular values near 1: X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X.

    Args:
        matrices: (batch, rows, columns) with rows ≤ columns, and singular values of at most 1 before the first step.
    """
    a, b, c = COEFFICIENTS
    gram = matrices @ matrices.mT
    gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(matrices, gram, matrices, beta=a)
