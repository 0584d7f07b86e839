"""One optimizer step: micro-batches forward and backward, the clip coefficient, the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from steplm.data.loader import Batch
from steplm.memory.measure import PeakMemory
from steplm.models.forward import batch_loss
from steplm.models.loss import IGNORE_INDEX
from steplm.optim.adamw import MasterAdamW, clip_coefficient, global_grad_norm
from steplm.types import Stage, TrainState


@dataclass(frozen=True)
class StepResult:
    loss: float  # token mean over the whole step, nats
    grad_norm: float  # before clipping

    @property
    def is_finite(self) -> bool:
        return self.loss - self.loss == 0 and self.grad_norm - self.grad_norm == 0


@dataclass(frozen=True)
class StepReport:
    """A logged step, as ``metrics.jsonl`` and the display get it."""

    stage: Stage
    progress: TrainState
    num_steps: int  # of the stage
    result: StepResult  # the loss is the mean since the last report
    learning_rate: float
    tokens_per_second: float
    peak: PeakMemory


def forward_backward(model: PreTrainedModel, batch: Batch, *, micro_batch_size: int, chunk_size: int) -> torch.Tensor:
    """Gradients of the mean loss over all valid tokens of ``batch``, accumulated over its micro-batches.

    Returns:
        The loss, a detached fp32 scalar on the model's device.
    """
    num_valid = max(int((batch.labels != IGNORE_INDEX).sum()), 1)
    total = torch.zeros((), device=model.device)
    for micro_batch in batch.split(micro_batch_size):
        on_device = micro_batch.to(model.device)
        loss = batch_loss(
            model,
            on_device.input_ids,
            on_device.labels,
            on_device.position_ids,
            num_valid=num_valid,
            chunk_size=chunk_size,
        )
        loss.backward()
        total += loss.detach()
    return total


def train_step(
    model: PreTrainedModel,
    optimizer: MasterAdamW,
    batch: Batch,
    *,
    learning_rate: float,
    max_grad_norm: float | None,
    micro_batch_size: int,
    chunk_size: int,
) -> StepResult:
    """One step. Nothing is updated where the loss or the gradient is not finite: the caller stops."""
    loss = forward_backward(model, batch, micro_batch_size=micro_batch_size, chunk_size=chunk_size)
    parameters: Sequence[torch.nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    norm = global_grad_norm(parameters)
    # One transfer for both numbers: on an accelerator each is a wait for the device.
    loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
    result = StepResult(loss_value, norm_value)
    if result.is_finite:
        optimizer.step(learning_rate, grad_scale=clip_coefficient(norm_value, max_grad_norm))
    optimizer.zero_grad()
    return result
