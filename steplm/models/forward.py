"""The loss of a batch, for any decoder-only family, without ever making the full logits."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from steplm.errors import ConfigError
from steplm.models.activations import offloaded_activations
from steplm.models.loss import IGNORE_INDEX, chunked_cross_entropy

# B sequences, S positions, D hidden size, N = B S rows, V vocabulary


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
    offload_activations: bool = False,
) -> Tensor:
    """Sum of the negative log-likelihood (nats) over the valid labels, divided by ``num_valid``; fp32 scalar.

    Args:
        input_ids: (B, S).
        labels: (B, S), the token that follows each input; ``IGNORE_INDEX`` where there is none.
        position_ids: (B, S), restarting at each document to keep attention inside it; ``None``: 0 … S-1.
        num_valid: labels to divide by: those of the whole optimizer step, over all micro-batches and ranks,
            which makes the loss invariant to gradient accumulation.
        chunk_size: rows of logits that exist at once.
        offload_activations: keep in host memory what the layers save for the backward pass.
    """

    def loss() -> Tensor:
        with offloaded_activations(model) if offload_activations else nullcontext():
            output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)
        head = model.get_output_embeddings()
        return chunked_cross_entropy(
            hidden,
            head.weight,
            labels.flatten(),
            num_valid=num_valid,
            chunk_size=chunk_size,
            bias=head.bias,
            low_rank=_low_rank(head, hidden),
            logit_scale=_logit_scale(model),
            softcap=getattr(model.config, "final_logit_softcapping", None),
        )

    # A sharded model gathers the head's matrix for a call of its own.
    as_forward: Any = getattr(model, "as_forward", None)
    return loss() if as_forward is None else as_forward(loss)


def _low_rank(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two factors of what an adapter adds to the logits, (N, rank) and (V, rank); None without an adapter."""
    adapter: Any = head
    if not hasattr(head, "lora_B"):
        return None
    return F.linear(hidden, adapter.lora_A) * adapter.scaling, adapter.lora_B


def _logit_scale(model: PreTrainedModel) -> float:
    """Families write it in two ways: Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``."""
    scale = getattr(model.config, "logit_scale", None)
    divisor = getattr(model.config, "logits_scaling", None)
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


def mean_loss(model: PreTrainedModel, batches: Iterable[TokenBatch], *, chunk_size: int) -> tuple[float, int]:
    """Token-weighted mean negative log-likelihood (nats) and the number of tokens it was taken over."""
    total, count = summed_loss(model, batches, chunk_size=chunk_size)
    return total / max(count, 1), count


@torch.no_grad()
def summed_loss(model: PreTrainedModel, batches: Iterable[TokenBatch], *, chunk_size: int) -> tuple[float, int]:
    """Negative log-likelihood (nats) over all tokens, and their number."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with uncompiled(model):
        for batch in batches:
            valid = int((batch.labels != IGNORE_INDEX).sum())
            batch = batch.to(model.device)
            total += float(
                batch_loss(model, batch.input_ids, batch.labels, batch.position_ids, num_valid=1, chunk_size=chunk_size)
            )
            count += valid
    model.train(was_training)
    return total, count


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, compiled layers run as they are written.

    For what is not a step of training: its shapes would be compiled too, one by one, up to the compiler's limit.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


@torch.no_grad()
def check_loss(model: PreTrainedModel, sequence_length: int) -> None:
    """Compare ``batch_loss`` with cross-entropy on the model's own logits, on one row of at most 16 tokens.

    A family may do to its logits what ``batch_loss`` does not know of: scale, cap or shift them.

    Raises:
        ConfigError: they differ.
    """
    was_training = model.training
    model.eval()
    vocab_size = model.config.get_text_config().vocab_size
    length = min(sequence_length, 16)
    input_ids = (torch.arange(length, device=model.device) * 7919 % vocab_size).unsqueeze(0)
    logits = model(input_ids=input_ids, use_cache=False).logits[0].float()
    # Fresh weights give nearly equal logits, whose mean loss is log V whatever their scale. Between the
    # likeliest and the unlikeliest tokens lie all the differences that there are.
    pairs = [
        (
            F.cross_entropy(logits, labels).item(),
            batch_loss(model, input_ids, labels.unsqueeze(0), num_valid=length, chunk_size=length).item(),
        )
        for labels in (logits.argmax(dim=1), logits.argmin(dim=1))
    ]
    model.train(was_training)
    spread = pairs[1][0] - pairs[0][0]
    tolerance = (1e-4 if model.dtype == torch.float32 else 2e-2) * spread + 1e-5
    for expected, actual in pairs:
        if not abs(actual - expected) <= tolerance:  # not >: NaN must not pass
            raise ConfigError(
                f"model_type {model.config.model_type!r} makes its logits in a way that the chunked loss does not "
                f"know: loss {actual:.6f}, but {expected:.6f} from the model's own logits. "
                "Choose another model_type or another configuration of it.",
                model_type=model.config.model_type,
                loss=actual,
                expected_loss=expected,
            )
