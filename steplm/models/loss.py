"""Cross-entropy computed from hidden states in chunks, without materializing the full logits.

N rows (tokens), D hidden size, V vocabulary, R rank, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_valid: int | Tensor,
    chunk_size: int = 512,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sequence_losses: Tensor | None = None,
) -> Tensor:
    """Sum of negative log-likelihoods over the valid labels, divided by ``num_valid``; an fp32 scalar.

    The logits are ``hidden @ weight.T + bias + low @ B.T`` in the dtype of ``hidden``; everything after that
    is fp32 (fp64 for fp64 inputs). One pass over the chunks, in forward, computes both the loss and the
    gradients, so that nothing is computed twice. Only required gradients are computed, and they can be used
    for a single backward pass.

    Args:
        hidden: (N, D).
        weight: (V, D), the language-model head.
        labels: (N,), already shifted; -100 is ignored.
        num_valid: divisor, usually the number of valid labels of the whole step, over all micro-batches.
        chunk_size: rows of logits computed at once.
        bias: (V,).
        low_rank: ``low`` (N, R) and ``B`` (V, R) of a head with an adapter.
        logit_scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sequence_losses: (B,) fp32, for rows that are B sequences of N / B tokens. Each sequence's summed loss is added
            to it, without the division.
    """
    low, B = (None, None) if low_rank is None else low_rank
    # Read here because grad mode is off inside a Function, and needs_input_grad is true even under no_grad.
    with_gradients = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(
        hidden,
        weight,
        low,
        B,
        bias,
        labels,
        num_valid,
        chunk_size,
        logit_scale,
        softcap,
        sequence_losses,
        with_gradients,
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        low: Tensor | None,
        B: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        num_valid: int | Tensor,
        chunk_size: int,
        logit_scale: float,
        softcap: float | None,
        sequence_losses: Tensor | None,
        with_gradients: bool,
    ) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        # Sums over chunks are fp32: a bf16 sum would lose the contributions of later chunks.
        dtypes = (hidden.dtype, accumulate, hidden.dtype, accumulate, accumulate)
        tensors = (hidden, weight, low, B, bias)
        grads = [
            torch.zeros_like(tensor, dtype=dtype) if with_gradients and need and tensor is not None else None
            for tensor, dtype, need in zip(tensors, dtypes, ctx.needs_input_grad[:5], strict=True)
        ]
        with_gradients = any(grad is not None for grad in grads)
        grad_bias = grads[4]

        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            logits = F.linear(hidden[rows], weight, bias)
            if low is not None and B is not None:
                logits.addmm_(low[rows], B.t())
            logits = logits.to(accumulate)
            sums = None
            if sequence_losses is not None:
                row = torch.arange(start, start + len(logits), device=hidden.device)
                sums = sequence_losses, row * len(sequence_losses) // len(hidden)
            total += _loss_of_chunk(logits, labels[rows], num_valid, logit_scale, softcap, with_gradients, sums)
            if with_gradients:
                if grad_bias is not None:
                    grad_bias += logits.sum(dim=0)
                logits = logits.to(hidden.dtype)
                _add_gradients_of_product(logits, hidden, weight, grads[0], grads[1], rows)
                if low is not None and B is not None:
                    _add_gradients_of_product(logits, low, B, grads[2], grads[3], rows)
            del logits  # before the next chunk's logits are allocated

        for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
            if tensor is not None and grad is not None:
                grads[i] = grad.to(tensor.dtype)
        ctx.grads = grads
        return total / num_valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "the gradients of this loss were made once, in its forward pass, and a backward pass has taken them: "
                "compute the loss again for another one"
            )
        # A one-element tensor, because a scalar would first be rounded to the dtype of the gradients.
        factor = grad_outputs[0].reshape(1)
        return (*(None if grad is None else grad.mul_(factor) for grad in grads), *[None] * 7)


def _loss_of_chunk(
    logits: Tensor,
    labels: Tensor,
    num_valid: int | Tensor,
    logit_scale: float,
    softcap: float | None,
    with_gradient: bool,
    sums: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Sum of negative log-likelihoods; overwrites ``logits`` (C, V), with their gradient if ``with_gradient``.

    Args:
        sums: tensor to add each row's loss to, and the index for each row.
    """
    valid = labels != IGNORE_INDEX
    target = labels.where(valid, 0).unsqueeze(1)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    # In place unless the softcap needs the logits again. This is safe because the kernels do not read an element again
    # after writing it.
    log_probs = torch.log_softmax(logits, dim=1, out=logits if softcap is None else None)
    if sums is not None:
        sums[0].index_add_(0, sums[1], (log_probs.gather(1, target).squeeze(1) * valid).to(sums[0].dtype), alpha=-1)
    loss = -(log_probs.gather(1, target).squeeze(1) * valid).sum()
    if with_gradient:
        # d loss / d logits = (softmax - one-hot of the label) / num_valid in valid rows, 0 in others
        row_scale = (valid.to(logits.dtype) / num_valid).unsqueeze(1)
        gradient = log_probs.exp_().mul_(row_scale).scatter_add_(1, target, -row_scale)
        if softcap is not None:  # d capped / d logits = 1 - (capped / softcap)^2
            logits.div_(softcap).square_().neg_().add_(1).mul_(gradient)
        if logit_scale != 1.0:
            logits.mul_(logit_scale)
    return loss


def _add_gradients_of_product(
    grad_logits: Tensor,
    inputs: Tensor,
    matrix: Tensor,
    grad_inputs: Tensor | None,
    grad_matrix: Tensor | None,
    rows: slice,
) -> None:
    """Add one chunk's gradients of ``inputs @ matrix.T`` to the requested gradients of ``inputs`` and ``matrix``."""
    if grad_inputs is not None:
        torch.mm(grad_logits, matrix, out=grad_inputs[rows])
    if grad_matrix is not None:
        if grad_logits.dtype == grad_matrix.dtype:
            grad_matrix.addmm_(grad_logits.t(), inputs[rows])
        else:
            grad_matrix += grad_logits.t() @ inputs[rows]
