"""Perplexity and bits per byte: the sum of negative log-likelihoods over the number of tokens.

N tokens, S positions of a window, W windows.
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
from steplm.errors import ConfigError, DataError
from steplm.eval.text import token_stream
from steplm.models.device import resolve_device
from steplm.models.folder import load_pretrained
from steplm.models.forward import mean_loss
from steplm.models.loss import IGNORE_INDEX
from steplm.units import perplexity_of

LOSS_CHUNK_SIZE = 1024  # rows of logits that exist at once
LONGEST_DEFAULT = 1024  # tokens


@dataclass(frozen=True)
class PerplexityResult:
    """Sums, from which every mean follows; ``num_text_bytes`` is ``None`` where the text is not known."""

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
        """Comparable between tokenizers, as perplexity is not."""
        return self.nll_sum / math.log(2) / self.num_text_bytes if self.num_text_bytes else None


def comparison_note(results: Sequence[PerplexityResult]) -> str | None:
    """What a reader must know who compares models by their results on one text; ``None`` where there is nothing."""
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

    The first token is context only: put a BOS or EOS there, and every token of the text is predicted.

    Args:
        token_ids: (N,), one stream.
        sequence_length: positions of a window, S. By default windows meet without overlap, and each window's
            last label is the next one's first input.
        stride: scored tokens of a window after the first: the windows slide, and each token but the first S
            has at least ``S - stride`` tokens of context. Costs ``S / stride`` times the work.
        batch_size: windows of one forward pass; the result does not depend on it.

    Raises:
        ConfigError: a stride outside 1 … S, or windows longer than the model's positions.
        DataError: fewer than two tokens, or a token that the model does not have.
    """
    tokens = torch.as_tensor(token_ids, dtype=torch.long).cpu()
    stride = sequence_length if stride is None else stride
    _check(model, tokens, sequence_length, stride)
    batches = _batches(tokens, sequence_length, stride, batch_size)
    loss, num_tokens = mean_loss(model, batches, chunk_size=LOSS_CHUNK_SIZE)
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
        sequence_length: default: what the model was trained with, where the folder says so, else its context,
            ``LONGEST_DEFAULT`` at most.
        max_tokens: tokens to predict; default: all.
        max_bytes: where ``max_tokens`` has cut the text for another model, whose tokenizer may differ: the text is cut
            there instead.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.
        dtype: ``auto`` (the file's), ``float32``, ``bfloat16``.

    Raises:
        CheckpointError, HubUnavailable: no model there.
        ConfigError, DataError: as ``perplexity`` and ``token_stream``.
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
    """The length of the model's training, where its folder says so; else its context, within a limit."""
    with contextlib.suppress(ConfigError):  # none, or a file of this name by another program
        return load_written_config(Path(folder) / "training_config.yaml").train.sequence_length
    return min(getattr(config, "max_position_embeddings", None) or LONGEST_DEFAULT, LONGEST_DEFAULT)


def _batches(tokens: Tensor, sequence_length: int, stride: int, batch_size: int) -> Iterator[Batch]:
    num_labels = len(tokens) - 1
    num_windows = 1 + max(0, math.ceil((num_labels - sequence_length) / stride))
    for first in range(0, num_windows, batch_size):
        starts = [index * stride for index in range(first, min(first + batch_size, num_windows))]
        # Padding stands to the right of everything that is scored: causal attention never sees it.
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
    num_positions = getattr(model.config, "max_position_embeddings", None)
    if num_positions is not None and sequence_length > num_positions:
        raise ConfigError(
            f"sequence length {sequence_length} is more than the model's {num_positions} positions. "
            f"Use {num_positions} or less.",
            sequence_length=sequence_length,
            max_position_embeddings=num_positions,
        )
    if len(tokens) < 2:
        raise DataError(f"perplexity needs at least 2 tokens, there are {len(tokens)}", num_tokens=len(tokens))
    largest, vocab_size = int(tokens.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= vocab_size:
        raise DataError(
            f"the text has token {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "model and tokenizer do not belong together",
            token=largest,
            vocab_size=vocab_size,
        )
