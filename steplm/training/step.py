"""One optimizer step: forward and backward over micro-batches, clipping, update; or the update fused into backward."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat

import torch
from transformers import PreTrainedModel

from steplm.config import RunConfig
from steplm.cost.measure import PeakMemory
from steplm.data.loader import Batch
from steplm.distributed.world import World
from steplm.models.forward import batch_loss, uncompiled
from steplm.models.loss import IGNORE_INDEX
from steplm.optim.adamw import clip_coefficient
from steplm.optim.build import UpdateRules
from steplm.schedule import Phase
from steplm.types import SourceLoss, TrainState


@dataclass(frozen=True)
class StepResult:
    loss: float  # token mean over the whole step, nats
    grad_norm: float  # before clipping
    is_spike: bool = False  # the norm is above the limit for an update
    sources: tuple[SourceLoss, ...] = ()  # per source of a mixture, in its order

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_updated(self) -> bool:
        return self.is_finite and not self.is_spike


@dataclass
class StageLog:
    """State of a stage's log between two log lines."""

    unlogged_losses: list[float] = field(default_factory=list)
    unlogged_sources: list[SourceLoss] = field(default_factory=list)  # of a mixture, summed over those steps
    logged_at: float = field(default_factory=time.monotonic)  # shifted forward by time not spent training
    steps_since: int = 0
    best_speed: float = 0.0  # tokens per second, of this stage
    told_of_load: bool = False

    def add(self, result: StepResult) -> None:
        self.steps_since += 1
        if result.is_updated:
            self.unlogged_losses.append(result.loss)
            before = self.unlogged_sources or [SourceLoss(0.0, 0)] * len(result.sources)
            self.unlogged_sources = [sum_ + new for sum_, new in zip(before, result.sources, strict=True)]


@dataclass(frozen=True)
class StepReport:
    """A logged step, as passed to ``metrics.jsonl`` and the display."""

    phase: Phase
    progress: TrainState
    num_steps: int  # of the stage
    result: StepResult  # its loss is the mean since the last report
    learning_rate: float
    tokens_per_second: float
    peak: PeakMemory
    source_losses: dict[str, float] = field(default_factory=dict)  # by source of a mixture, since the last report
    mfu: float | None = None  # see ``RunContext.mfu``


@dataclass(frozen=True)
class StepOptions:
    """How the forward and backward pass of a batch is run."""

    micro_batch_size: int  # in sequences
    chunk_size: int  # rows of logits computed at once
    offload_activations: bool = False
    fused_backward: bool = False  # update each parameter as soon as its gradient is ready
    num_sources: int = 0  # of a mixture
    world: World = field(default_factory=lambda: World(torch.device("cpu")))  # each rank gets its share of a batch


def step_options(config: RunConfig, world: World) -> StepOptions:
    """Step options from a run's config."""
    return StepOptions(
        micro_batch_size=config.train.per_device_train_batch_size,
        chunk_size=config.train.loss_chunk_size,
        offload_activations=config.memory.offload_activations,
        fused_backward=config.memory.fused_backward,
        num_sources=len(config.data.weights),
        world=world,
    )


def forward_backward(
    model: PreTrainedModel, batch: Batch, options: StepOptions, sequence_losses: torch.Tensor | None = None
) -> torch.Tensor:
    """Accumulate over micro-batches the gradients of the mean loss over all valid tokens on all ranks.

    Args:
        sequence_losses: (B,) fp32; each sequence's summed loss is added to it.

    Returns:
        This rank's share of the loss, a detached fp32 scalar on the model's device.
    """
    total = torch.zeros((), device=model.device)
    for loss in _micro_losses(model, batch, options, sequence_losses):
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
    highest_grad_norm: float = math.inf,
) -> StepResult:
    """Run one step; skip the update if the loss or the gradient norm is not finite, or if the norm is a spike.

    With ``fused_backward``, each parameter is updated during the backward pass, before the global gradient norm is
    known. Gradients are therefore clipped by the previous step's norm, and non-finite gradients are detected too late
    to skip the update.

    Raises:
        ValueError: with ``fused_backward``, the batch has more than one micro-batch, and the optimizer is not in host
            memory, where their gradients could be summed.
    """
    if options.fused_backward:
        scale = 1.0 if last_grad_norm is None else clip_coefficient(last_grad_norm, max_grad_norm)
        return _fused_step(model, optimizer, batch, options, learning_rate, scale)
    result = _gradients(model, optimizer, batch, options)
    result = replace(result, is_spike=result.grad_norm > highest_grad_norm)
    if result.is_updated:
        optimizer.step(learning_rate, grad_scale=clip_coefficient(result.grad_norm, max_grad_norm))
    else:
        optimizer.finish_updates()
    optimizer.zero_grad()
    return result


def trial(model: PreTrainedModel, optimizer: UpdateRules, batch: Batch, options: StepOptions) -> tuple[float, float]:
    """Loss and gradient norm of a batch, with the memory use of a step but no update; gradients are cleared.

    Raises:
        ValueError: as ``train_step``.
    """
    with uncompiled(model):
        if options.fused_backward:
            result = _fused_step(model, optimizer, batch, options, None, 1.0)
        else:
            result = _gradients(model, optimizer, batch, options)
            optimizer.zero_grad()
    return result.loss, result.grad_norm


def _gradients(model: PreTrainedModel, optimizer: UpdateRules, batch: Batch, options: StepOptions) -> StepResult:
    """Accumulate the gradients of a step."""
    of_sequences = _sequence_losses(model, batch)
    loss = forward_backward(model, batch, options, of_sequences)
    loss_value, norm_value, *nats = _numbers(of_sequences, loss, optimizer.grad_norm().to(loss))
    return _over_ranks(options.world, loss_value, norm_value, _of_sources(batch, nats, options))


def _sequence_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor | None:
    """Zeros to accumulate each sequence's loss in; None if the data is not a mixture."""
    return None if batch.source_ids is None else torch.zeros(len(batch), device=model.device)


def _numbers(sequence_losses: torch.Tensor | None, *scalars: torch.Tensor) -> list[float]:
    """The scalars, then the losses, in one transfer: on an accelerator every transfer waits for the device."""
    losses = [] if sequence_losses is None else [sequence_losses]
    return torch.cat((torch.stack(scalars), *losses)).tolist()


def _of_sources(batch: Batch, nats: Sequence[float], options: StepOptions) -> list[SourceLoss]:
    """This rank's loss and token count for each source of a mixture, from the summed loss of each sequence."""
    sources = [SourceLoss(0.0, 0)] * options.num_sources
    if batch.source_ids is not None:
        counts = (batch.labels != IGNORE_INDEX).sum(1)
        for source, loss, count in zip(batch.source_ids.tolist(), nats, counts.tolist(), strict=True):
            sources[source] += SourceLoss(loss, count)
    return sources


def _over_ranks(world: World, loss: float, norm: float, sources: Sequence[SourceLoss] = ()) -> StepResult:
    """Sum the ranks' shares of the loss, and compute the norm of gradients whose rows are split across ranks."""
    if world.is_alone:
        return StepResult(loss, norm, sources=tuple(sources))
    loss, square, *sums = world.sum(loss, norm * norm, *(value for s in sources for value in (s.nats, s.tokens)))
    norm = math.sqrt(square / world.num_replicas)  # replicas have the same gradients
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return StepResult(loss, norm, sources=tuple(SourceLoss(nats, round(tokens)) for nats, tokens in pairs))


def _micro_losses(
    model: PreTrainedModel, batch: Batch, options: StepOptions, sequence_losses: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Yield each micro-batch's share of the mean loss over all valid tokens on all ranks; the shares sum to it."""
    (num_valid,) = options.world.sum((batch.labels != IGNORE_INDEX).sum().item())
    parts = repeat(None) if sequence_losses is None else sequence_losses.split(options.micro_batch_size)
    for micro_batch, losses in zip(batch.split(options.micro_batch_size), parts, strict=False):
        on_device = micro_batch.to(model.device)
        yield batch_loss(
            model,
            on_device.input_ids,
            on_device.labels,
            on_device.position_ids,
            num_valid=max(int(num_valid), 1),
            chunk_size=options.chunk_size,
            offload_activations=options.offload_activations,
            sequence_losses=losses,
        )


def _fused_step(
    model: PreTrainedModel,
    optimizer: UpdateRules,
    batch: Batch,
    options: StepOptions,
    learning_rate: float | None,
    grad_scale: float,
) -> StepResult:
    num_micro_batches = -(-len(batch.input_ids) // options.micro_batch_size)
    if num_micro_batches > 1 and optimizer.host is None:
        raise ValueError(
            f"{len(batch.input_ids)} sequences in micro-batches of {options.micro_batch_size}: "
            "fused_backward frees the gradients that accumulation would add to"
        )
    of_sequences = _sequence_losses(model, batch)
    total = torch.zeros((), device=model.device)
    for number, loss in enumerate(_micro_losses(model, batch, options, of_sequences), start=1):
        total += loss.detach()
        if number < num_micro_batches:
            loss.backward()
    own_loss, *nats = _numbers(of_sequences, total)
    result = _over_ranks(options.world, own_loss, 0.0, _of_sources(batch, nats, options))
    if not math.isfinite(result.loss):
        optimizer.zero_grad()
        return replace(result, grad_norm=math.nan)
    with optimizer.in_backward(learning_rate, grad_scale) as norm:
        loss.backward()
    return replace(result, grad_norm=_over_ranks(options.world, 0.0, norm.total().item()).grad_norm)
