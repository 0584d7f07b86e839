"""The loss of a batch, for any decoder-only family, without ever making the full logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steplm.models.loss import chunked_cross_entropy

# B sequences, S positions, D hidden size


class TokenBatch(Protocol):
    """What ``mean_loss`` asks of a batch; the data loader's has it."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor | None: ...

    def to(self, device: torch.device | str) -> TokenBatch: ...


def batch_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    *,
    num_valid: int,
    chunk_size: int,
) -> Tensor:
    """Sum of the negative log-likelihood (nats) over the valid labels, divided by ``num_valid``; fp32 scalar.

    Args:
        input_ids: (B, S).
        labels: (B, S), the token that follows each input; -100 where there is none.
        position_ids: (B, S), restarting at each document to keep attention inside it; ``None``: 0 … S-1.
        num_valid: labels to divide by: those of the whole optimizer step, over all micro-batches and ranks,
            which makes the loss invariant to gradient accumulation.
        chunk_size: rows of logits that exist at once.
    """
    hidden = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return chunked_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        labels.flatten(),
        num_valid=num_valid,
        chunk_size=chunk_size,
        bias=head.bias,
        logit_scale=_logit_scale(model),
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )


def _logit_scale(model: PreTrainedModel) -> float:
    """Families write it in two ways: Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``."""
    scale = getattr(model.config, "logit_scale", None)
    divisor = getattr(model.config, "logits_scaling", None)
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterable[TokenBatch], *, chunk_size: int) -> tuple[float, int]:
    """Token-weighted mean negative log-likelihood (nats) and the number of tokens it was taken over."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        valid = int((batch.labels != -100).sum())
        batch = batch.to(model.device)
        total += float(
            batch_loss(model, batch.input_ids, batch.labels, batch.position_ids, num_valid=1, chunk_size=chunk_size)
        )
        count += valid
    model.train(was_training)
    return total / max(count, 1), count
