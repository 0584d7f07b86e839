"""Perplexity and bits per byte of a model on text, from the sum of negative log-likelihoods.

N tokens, S positions per window.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from steplm.config import load_written_config
from steplm.data.loader import Batch
from steplm.data.tokenizer import load_tokenizer
from steplm.errors import CheckpointError, ConfigError, DataError
from steplm.eval.text import token_stream
from steplm.models.device import resolve_device
from steplm.models.folder import load_pretrained
from steplm.models.forward import (
    check_loss,
    mean_loss,
    require_known_tokens,
    require_positions,
    running,
    usual_length,
)
from steplm.models.loss import IGNORE_INDEX
from steplm.units import perplexity_of


@dataclass(frozen=True)
class PerplexityResult:
    """Sums that give every mean; ``num_text_bytes`` is ``None`` if the text is unknown."""

    nll_sum: float  # nats
    num_tokens: int  # predicted
    num_text_bytes: int | None = None  # UTF-8
    num_skipped_records: int = 0  # empty or unusable

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.nll_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers, unlike perplexity."""
        return self.nll_sum / math.log(2) / self.num_text_bytes if self.num_text_bytes else None


def comparison_note(results: Sequence[PerplexityResult]) -> str | None:
    """A caveat for readers who compare these models' results on one text; ``None`` if there is none."""
    if len({(result.num_tokens, result.num_text_bytes) for result in results}) < 2:
        return None
    note = "the models split this text into different tokens: compare bits per byte, not perplexity"
    sizes = {result.num_text_bytes for result in results if result.num_text_bytes is not None}
    if len(sizes) > 1:
        note += (
            f". It was cut after {min(sizes):,} bytes for one model and {max(sizes):,} for another: score them in one "
            "command to cut it at the same place"
        )
    return note


def perplexity(
    model: PreTrainedModel,
    token_ids: Sequence[int] | npt.NDArray[np.uint32] | Tensor,
    *,
    sequence_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    num_text_bytes: int | None = None,
) -> PerplexityResult:
    """Score every token but the first exactly once.

    The first token is only context: make it BOS or EOS to have every token of the text predicted.

    Args:
        token_ids: (N,), one stream.
        sequence_length: positions per window, S. By default windows do not overlap, and the last label of each is
            the first input of the next.
        stride: tokens scored per window after the first. The windows slide, and every token after the first S has
            at least ``S - stride`` tokens of context, at ``S / stride`` times the compute.
        batch_size: windows per forward pass; it does not affect the result.

    Raises:
        ConfigError: the stride is outside 1 … S, windows are longer than the model's context, or the model cannot be
            run, is not causal, or makes its logits in a way that the chunked loss does not know.
        CheckpointError: the loss is not a finite number.
        DataError: there are fewer than two tokens, or a token is outside the model's vocabulary.
    """
    tokens = torch.as_tensor(token_ids, dtype=torch.long).cpu()
    stride = sequence_length if stride is None else stride
    _check(model, tokens, sequence_length, stride)
    check_loss(model, sequence_length)
    batches = _batches(tokens, sequence_length, stride, batch_size)
    with running(model):
        loss, num_tokens = mean_loss(model, batches)
    if not math.isfinite(loss):
        raise CheckpointError(f"the loss is {loss}: some weights or settings are too large for dtype {model.dtype}")
    return PerplexityResult(loss * num_tokens, num_tokens, num_text_bytes)


def evaluate_folder(
    folder: str | Path,
    data_entries: Sequence[str],
    *,
    text_field: str = "text",
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    max_bytes: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> PerplexityResult:
    """Perplexity and bits per byte of a Hugging Face folder (or hub model) with its own tokenizer.

    Args:
        data_entries: as in ``data.train``; see ``token_stream`` for how they become one stream.
        sequence_length: default: the training length if the folder records it, else the model's context, at most
            1024.
        max_tokens: tokens to predict; default: all.
        max_bytes: bytes of text to score, instead of ``max_tokens``: where ``max_tokens`` cut the text for another
            model, whose tokenizer may differ.
        device: ``auto`` (CUDA if available), ``cpu``, ``cuda``.
        dtype: ``auto`` (as in the checkpoint), ``float32``, ``bfloat16``.

    Raises:
        CheckpointError, HubUnavailable: no model was found.
        ConfigError, DataError: as in ``perplexity`` and ``token_stream``.
    """
    model = load_pretrained(folder, dtype=dtype).to(resolve_device(device))
    tokenizer = load_tokenizer(folder)
    stream = token_stream(data_entries, tokenizer, text_field=text_field, max_tokens=max_tokens)
    if max_bytes is not None and stream.num_text_bytes != max_bytes:
        stream = token_stream(data_entries, tokenizer, text_field=text_field, max_bytes=max_bytes)
    result = perplexity(
        model,
        stream.token_ids,
        sequence_length=sequence_length or default_sequence_length(folder, model.config),
        stride=stride,
        batch_size=batch_size,
        num_text_bytes=stream.num_text_bytes,
    )
    return replace(result, num_skipped_records=stream.num_skipped_records)


def default_sequence_length(folder: str | Path, config: PretrainedConfig) -> int:
    """The model's training length if its folder records it, else its context, at most 1024."""
    with contextlib.suppress(ConfigError):  # no such file, or another program's file of the same name
        return load_written_config(Path(folder) / "training_config.yaml").train.sequence_length
    return usual_length(config)


def _batches(tokens: Tensor, sequence_length: int, stride: int, batch_size: int) -> Iterator[Batch]:
    num_labels = len(tokens) - 1
    num_windows = 1 + max(0, math.ceil((num_labels - sequence_length) / stride))
    for first in range(0, num_windows, batch_size):
        starts = [index * stride for index in range(first, min(first + batch_size, num_windows))]
        # Padding is to the right of all scored tokens, so causal attention never sees it.
        input_ids = torch.zeros(len(starts), sequence_length, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, start in enumerate(starts):
            window = tokens[start : start + sequence_length + 1]
            seen_before = 0 if start == 0 else sequence_length - stride
            input_ids[row, : len(window) - 1] = window[:-1]
            labels[row, seen_before : len(window) - 1] = window[1 + seen_before :]
        yield Batch(input_ids=input_ids, labels=labels, position_ids=None)


def _check(model: PreTrainedModel, tokens: Tensor, sequence_length: int, stride: int) -> None:
    if not 1 <= stride <= sequence_length:
        raise ConfigError(
            f"stride is {stride}, but must lie between 1 and the sequence length {sequence_length}",
            stride=stride,
            sequence_length=sequence_length,
        )
    require_positions(model.config, sequence_length)
    if len(tokens) < 2:
        raise DataError(f"perplexity needs at least 2 tokens, there are {len(tokens)}", num_tokens=len(tokens))
    require_known_tokens(model, int(tokens.max()))
