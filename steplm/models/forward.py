"""The loss of a batch for any decoder-only family, without materializing the full logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from steplm.errors import ConfigError, DataError
from steplm.models.activations import offloaded_activations
from steplm.models.loss import IGNORE_INDEX, chunked_cross_entropy
from steplm.units import reason

LOSS_CHUNK_SIZE = 1024  # rows of logits materialized at a time
LONGEST_DEFAULT = 1024  # tokens

# B sequences, S positions, D hidden size, N = B S rows, V vocabulary


class TokenBatch(Protocol):
    """The batch interface that ``mean_loss`` needs; the data loader's ``Batch`` implements it."""

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
    sequence_losses: Tensor | None = None,
) -> Tensor:
    """Sum of the negative log-likelihood (nats) over the valid labels, divided by ``num_valid``; fp32 scalar.

    Args:
        input_ids: (B, S).
        labels: (B, S), the token that follows each input; ``IGNORE_INDEX`` where there is none.
        position_ids: (B, S), restarting at each document to keep attention within it; None: 0 … S-1.
        num_valid: number of valid labels in the whole optimizer step, over all micro-batches and ranks, which makes
            the loss invariant to gradient accumulation.
        chunk_size: rows of logits computed at once.
        offload_activations: keep the layers' saved activations in host memory.
        sequence_losses: (B,) fp32; each sequence's summed loss is added to it, without the division.
    """

    def loss() -> Tensor:
        with offloaded_activations(model) if offload_activations else nullcontext():
            output = _decoder(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False)
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
            sequence_losses=sequence_losses,
        )

    # A sharded model gathers the head's weight only during a call of the root module.
    as_forward: Any = getattr(model, "as_forward", None)
    return loss() if as_forward is None else as_forward(loss)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its head; ``base_model`` is the whole model if its prefix is wrong, as in Llama 4."""
    decoder = model.base_model
    return model.model if decoder is model and hasattr(model, "model") else decoder


def _low_rank(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors, (N, rank) and (V, rank), of an adapter's contribution to the logits; None without an adapter."""
    adapter: Any = head
    if not hasattr(head, "lora_B"):
        return None
    return F.linear(hidden, adapter.lora_A) * adapter.scaling, adapter.lora_B


def _logit_scale(model: PreTrainedModel) -> float:
    """The factor on the logits: Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``."""
    scale = getattr(model.config, "logit_scale", None)
    divisor = getattr(model.config, "logits_scaling", None)
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


def mean_loss(
    model: PreTrainedModel, batches: Iterable[TokenBatch], *, chunk_size: int = LOSS_CHUNK_SIZE
) -> tuple[float, int]:
    """Token-weighted mean negative log-likelihood (nats), and the number of tokens."""
    total, count = summed_loss(model, batches, chunk_size=chunk_size)
    return total / max(count, 1), count


def summed_loss(model: PreTrainedModel, batches: Iterable[TokenBatch], *, chunk_size: int) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) of all tokens, and their number."""
    total, count = 0.0, 0
    with evaluating(model), uncompiled(model):
        for batch in batches:
            valid = int((batch.labels != IGNORE_INDEX).sum())
            batch = batch.to(model.device)
            total += float(
                batch_loss(model, batch.input_ids, batch.labels, batch.position_ids, num_valid=1, chunk_size=chunk_size)
            )
            count += valid
    return total, count


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run compiled layers eagerly inside this context.

    For anything other than training steps: each of its shapes would trigger a recompilation, up to the compiler's
    limit.
    """
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def require_positions(config: PretrainedConfig, sequence_length: int) -> None:
    """Raise ``ConfigError`` if the model has fewer positions."""
    num_positions = getattr(config, "max_position_embeddings", None)
    if num_positions is not None and sequence_length > num_positions:
        raise ConfigError(
            f"sequence length {sequence_length} is more than the model's {num_positions} positions. "
            f"Use {num_positions} or less.",
            sequence_length=sequence_length,
            max_position_embeddings=num_positions,
        )


def require_known_tokens(model: PreTrainedModel, largest: int) -> None:
    """Raise ``DataError`` if the largest token of a text is outside the model's vocabulary."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if largest >= vocab_size:
        raise DataError(
            f"the text has token {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "model and tokenizer do not belong together",
            token=largest,
            vocab_size=vocab_size,
        )


def usual_length(config: PretrainedConfig) -> int:
    """The model's context, at most ``LONGEST_DEFAULT``."""
    return min(getattr(config, "max_position_embeddings", None) or LONGEST_DEFAULT, LONGEST_DEFAULT)


def check_loss(model: PreTrainedModel, sequence_length: int) -> None:
    """Compare ``batch_loss`` with cross-entropy on the model's own logits, on one row of at most 16 tokens.

    A family may transform its logits in ways that ``batch_loss`` does not support, such as scaling, capping, or
    shifting. It may also let tokens attend to later tokens, which they are supposed to predict.

    Raises:
        ConfigError: the losses differ, the model is not causal, its logits are NaN, or it cannot be run.
    """
    with evaluating(model), running(model):
        _check_loss(model, *_check_causal(model, min(sequence_length, 16)))


def check_causal(model: PreTrainedModel) -> None:
    """Require that no logits depend on later tokens, on one row of at most 16 tokens.

    Raises:
        ConfigError: they do, or are NaN, or the model cannot be run.
    """
    with evaluating(model), running(model):
        _check_causal(model, min(getattr(model.config, "max_position_embeddings", None) or 16, 16))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without gradients, and back into its own mode at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def running(model: PreTrainedModel, what: str = "be run on a row of tokens") -> Iterator[None]:
    """Turn errors of the modeling code, which hardly checks its configuration, into a ``ConfigError``."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        is_about_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if is_about_memory or hasattr(model, "as_forward"):  # when sharded, the error may concern another rank
            raise
        raise ConfigError(
            f"model_type {model.config.model_type!r} cannot {what}: {reason(error)}",
            model_type=model.config.model_type,
        ) from None


def _check_causal(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor, float]:
    """Check as ``check_causal`` says; return the tokens of the row, their logits, and the tolerance for rounding."""
    vocab_size = model.config.get_text_config().vocab_size
    input_ids = (torch.arange(length, device=model.device) * 7919 % vocab_size).unsqueeze(0)
    logits = model(input_ids=input_ids, use_cache=False).logits[0].float()
    spread = float((logits.amax(dim=1) - logits.amin(dim=1)).mean())
    tolerance = (1e-4 if model.dtype == torch.float32 else 2e-2) * spread + 1e-5
    with_another_end = input_ids.clone()
    with_another_end[0, -1] = (input_ids[0, -1] + 1) % vocab_size
    changed = model(input_ids=with_another_end, use_cache=False).logits[0].float()
    if logits.isnan().any():
        raise ConfigError(
            f"model_type {model.config.model_type!r} makes logits that are NaN: some weights or settings are too large "
            f"for dtype {model.dtype}.",
            model_type=model.config.model_type,
        )
    if not bool(((changed - logits)[:-1].abs() <= tolerance).all()):
        raise ConfigError(
            f"model_type {model.config.model_type!r} is not causal: its logits depend on the tokens that follow, which "
            "they are to predict. Choose another model_type or another configuration of it (is_decoder).",
            model_type=model.config.model_type,
        )
    return input_ids, logits, tolerance


def _check_loss(model: PreTrainedModel, input_ids: Tensor, logits: Tensor, tolerance: float) -> None:
    # Fresh weights give nearly equal logits, whose mean loss is about log V whatever their scale. Labels at the highest
    # and the lowest logits make the loss depend on it as much as possible.
    for labels in (logits.argmax(dim=1), logits.argmin(dim=1)):
        wanted, length = F.cross_entropy(logits, labels).item(), len(labels)
        actual = batch_loss(model, input_ids, labels.unsqueeze(0), num_valid=length, chunk_size=length).item()
        if not abs(actual - wanted) <= tolerance:  # not `>`, which NaN would pass
            raise ConfigError(
                f"model_type {model.config.model_type!r} makes its logits in a way that the chunked loss does not "
                f"know: loss {actual:.6f}, but {wanted:.6f} from the model's own logits. "
                "Choose another model_type or another configuration of it.",
                model_type=model.config.model_type,
                loss=actual,
                expected_loss=wanted,
            )
