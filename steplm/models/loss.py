"""Cross-entropy straight from hidden states: the full logits never exist.

N rows (tokens), D hidden size, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_valid: int | Tensor,
    chunk_size: int = 512,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of negative log-likelihoods over the valid labels, divided by ``num_valid``; an fp32 scalar.

    The logits are ``hidden @ weight.T + bias`` in the dtype of ``hidden``, everything after that is fp32
    (fp64 for fp64 inputs). Loss and gradients come from one pass over chunks, in the forward, so that
    nothing is computed twice; gradients that nobody needs are not computed.

    Args:
        hidden: (N, D).
        weight: (V, D), the language-model head.
        labels: (N,), not shifted here; -100 is ignored.
        num_valid: divisor, usually the number of valid labels of the whole step, over all micro-batches.
        chunk_size: rows of logits that exist at once.
        bias: (V,).
        logit_scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    """
    # Inside a Function grad mode is off, and needs_input_grad is true under no_grad as well.
    with_gradients = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(
        hidden, weight, bias, labels, num_valid, chunk_size, logit_scale, softcap, with_gradients
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        num_valid: int | Tensor,
        chunk_size: int,
        logit_scale: float,
        softcap: float | None,
        with_gradients: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (with_gradients and need for need in ctx.needs_input_grad[:3])
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if bias is not None and needs_bias else None

        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = hidden[start : start + chunk_size]
            valid = labels[start : start + chunk_size] != IGNORE_INDEX
            target = labels[start : start + chunk_size].where(valid, 0).unsqueeze(1)

            logits = torch.nn.functional.linear(rows, weight, bias).to(accumulate)
            if logit_scale != 1.0:
                logits.mul_(logit_scale)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            log_probs = logits.log_softmax(dim=1)
            total -= (log_probs.gather(1, target).squeeze(1) * valid).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue

            # d loss / d logits = (softmax - one-hot of the label) / num_valid in valid rows, 0 in others
            row_scale = (valid.to(accumulate) / num_valid).unsqueeze(1)
            grad_logits = log_probs.exp_().mul_(row_scale).scatter_add_(1, target, -row_scale)
            if softcap is not None:
                grad_logits.mul_(1 - (logits / softcap).square_())
            if logit_scale != 1.0:
                grad_logits.mul_(logit_scale)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk_size])
            if grad_weight is not None:
                if grad_logits.dtype == accumulate:
                    grad_weight.addmm_(grad_logits.t(), rows)
                else:
                    # Summed over chunks in fp32: a sum in bf16 loses what later chunks add.
                    grad_weight += grad_logits.t() @ rows

        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
        )
        return total / num_valid

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # One element rather than a scalar: a scalar would be rounded to the gradients' dtype first.
        factor = grad_outputs[0].reshape(1)
        grads = [
            None if grad is None else torch.mul(grad, factor, out=torch.empty_like(grad)) for grad in ctx.saved_tensors
        ]
        return (*grads, None, None, None, None, None, None)
