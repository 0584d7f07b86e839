"""One optimizer step: micro-batches forward and backward, the clip coefficient, the update; or all in one backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from steplm.config import RunConfig
from steplm.cost.measure import PeakMemory
from steplm.data.loader import Batch
from steplm.distributed.world import World
from steplm.models.forward import batch_loss, uncompiled
from steplm.models.loss import IGNORE_INDEX
from steplm.optim.adamw import clip_coefficient, global_grad_norm
from steplm.optim.build import UpdateRules
from steplm.schedule import Phase
from steplm.types import TrainState


@dataclass(frozen=True)
class StepResult:
    loss: float  # token mean over the whole step, nats
    grad_norm: float  # before clipping

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class StepReport:
    """A logged step, as ``metrics.jsonl`` and the display get it."""

    phase: Phase
    progress: TrainState
    num_steps: int  # of the stage
    result: StepResult  # the loss is the mean since the last report
    learning_rate: float
    tokens_per_second: float
    peak: PeakMemory


@dataclass(frozen=True)
class StepOptions:
    """How a batch goes forward and backward."""

    micro_batch_size: int  # sequences at once
    chunk_size: int  # rows of logits at once
    offload_activations: bool = False
    fused_backward: bool = False  # each parameter is updated as soon as its gradient is there
    world: World = field(default_factory=lambda: World(torch.device("cpu")))  # batches are a rank's part


def step_options(config: RunConfig, world: World) -> StepOptions:
    """How every forward and backward pass of a run is computed."""
    return StepOptions(
        micro_batch_size=config.train.per_device_train_batch_size,
        chunk_size=config.train.loss_chunk_size,
        offload_activations=config.memory.offload_activations,
        fused_backward=config.memory.fused_backward,
        world=world,
    )


def forward_backward(model: PreTrainedModel, batch: Batch, options: StepOptions) -> torch.Tensor:
    """Gradients of the mean loss over all valid tokens of all ranks' batches, accumulated over micro-batches.

    Returns:
        This rank's share of the loss, a detached fp32 scalar on the model's device.
    """
    total = torch.zeros((), device=model.device)
    for loss in _micro_losses(model, batch, options):
        loss.backward()
        total += loss.detach()
    return total


def train_step(
    model: PreTrainedModel,
    optimizer: UpdateRules,
    batch: Batch,
    options: StepOptions,
    *,
    learning_rate: float,
    max_grad_norm: float | None,
    last_grad_norm: float | None = None,
) -> StepResult:
    """One step. Nothing is updated where the loss or the gradient is not finite.

    With ``fused_backward`` each parameter is updated within the backward pass, before the norm of all gradients is
    known: it is clipped by that of the step before, and a gradient that is not finite is met too late.

    Raises:
        ValueError: ``fused_backward`` with more than one micro-batch.
    """
    if options.fused_backward:
        scale = 1.0 if last_grad_norm is None else clip_coefficient(last_grad_norm, max_grad_norm)
        return _fused_step(model, optimizer, batch, options, learning_rate, scale)
    loss = forward_backward(model, batch, options)
    norm = global_grad_norm(optimizer.parameters.values())
    # One transfer for both numbers: on an accelerator each is a wait for the device.
    result = _over_ranks(options.world, *torch.stack((loss, norm.to(loss))).tolist())
    if result.is_finite:
        optimizer.step(learning_rate, grad_scale=clip_coefficient(result.grad_norm, max_grad_norm))
    optimizer.zero_grad()
    return result


def trial(model: PreTrainedModel, optimizer: UpdateRules, batch: Batch, options: StepOptions) -> tuple[float, float]:
    """Loss and gradient norm of a batch, in the memory of a step but without the update; no gradient is left.

    Raises:
        ValueError: ``fused_backward`` with more than one micro-batch.
    """
    with uncompiled(model):
        if options.fused_backward:
            result = _fused_step(model, optimizer, batch, options, None, 1.0)
            return result.loss, result.grad_norm
        loss = forward_backward(model, batch, options)
    norm = global_grad_norm(optimizer.parameters.values())
    optimizer.zero_grad()
    result = _over_ranks(options.world, float(loss), float(norm))
    return result.loss, result.grad_norm


def _over_ranks(world: World, loss: float, norm: float) -> StepResult:
    """The loss of which each rank has a share, and the norm of the gradients of which each has some rows."""
    if world.is_alone:
        return StepResult(loss, norm)
    loss, square = world.sum(loss, norm * norm)
    return StepResult(loss, math.sqrt(square / world.num_replicas))  # replicas have the same gradients


def _micro_losses(model: PreTrainedModel, batch: Batch, options: StepOptions) -> Iterator[torch.Tensor]:
    """Each micro-batch's share of the mean loss over all valid tokens of all ranks' batches; they sum to it."""
    (num_valid,) = options.world.sum((batch.labels != IGNORE_INDEX).sum().item())
    for micro_batch in batch.split(options.micro_batch_size):
        on_device = micro_batch.to(model.device)
        yield batch_loss(
            model,
            on_device.input_ids,
            on_device.labels,
            on_device.position_ids,
            num_valid=max(int(num_valid), 1),
            chunk_size=options.chunk_size,
            offload_activations=options.offload_activations,
        )


def _fused_step(
    model: PreTrainedModel,
    optimizer: UpdateRules,
    batch: Batch,
    options: StepOptions,
    learning_rate: float | None,
    grad_scale: float,
) -> StepResult:
    if len(batch.input_ids) > options.micro_batch_size:
        raise ValueError(
            f"{len(batch.input_ids)} sequences in micro-batches of {options.micro_batch_size}: "
            "fused_backward frees the gradients that accumulation would add to"
        )
    (loss,) = _micro_losses(model, batch, options)
    (loss_value,) = options.world.sum(loss.item())
    if not math.isfinite(loss_value):
        return StepResult(loss_value, math.nan)
    with optimizer.in_backward(learning_rate, grad_scale) as norm:
        loss.backward()
    return StepResult(loss_value, _over_ranks(options.world, 0.0, norm.total().item()).grad_norm)
