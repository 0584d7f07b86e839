"""Validation losses during a run, and the check that losses are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator

from transformers import PreTrainedModel

from steplm.checkpoint import latest_checkpoint
from steplm.data.loader import Batch, validation_windows
from steplm.errors import TrainingDiverged
from steplm.models.forward import summed_loss
from steplm.training.context import RunContext
from steplm.types import TrainState
from steplm.units import perplexity_of

PROBE_WINDOWS = 32  # validation windows for comparing the loss before and after merge and growth


def evaluate(run: RunContext, progress: TrainState, model: PreTrainedModel) -> float:
    """Evaluate every validation set, log and display the losses, and return the loss of the first set.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    losses = {name: validation_loss(run, model, name=name) for name in run.validation}
    loss = next(iter(losses.values()))
    require_finite(run, progress, loss)
    perplexity = perplexity_of(loss)
    run.metrics.write(
        "eval",
        stage=progress.stage_index,
        step=progress.step,
        tokens_seen=progress.tokens_seen,
        loss=loss,
        perplexity=perplexity,
        **({f"loss_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}),
    )
    run.display.evaluation(progress, loss, perplexity)
    if len(losses) > 1:
        run.display.note("  ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    return loss


def probe_loss(run: RunContext, model: PreTrainedModel) -> float:
    """Mean loss on a small, fixed set of validation windows."""
    return validation_loss(run, model, PROBE_WINDOWS * run.config.train.sequence_length)


def validation_loss(
    run: RunContext, model: PreTrainedModel, max_tokens: int | None = None, *, name: str | None = None
) -> float:
    """Mean validation loss; each rank computes its share.

    Args:
        max_tokens: tokens to evaluate on; default ``eval.max_tokens``.
        name: validation set; default the first.
    """
    batches = validation_windows(
        run.validation[name or next(iter(run.validation))],
        run.config.train.sequence_length,
        max_tokens or run.config.eval.max_tokens,
        batch_size=run.config.eval_batch_size,
        within_documents=run.config.data.within_documents,
        rank=run.world.rank,
        world_size=run.world.size,
    )
    chunk_size = run.config.train.loss_chunk_size
    total, count = run.world.sum(*summed_loss(model, _alive(run, batches), chunk_size=chunk_size))
    return total / max(count, 1)


def require_finite(run: RunContext, progress: TrainState, loss: float, grad_norm: float | None = None) -> None:
    """Stop if the loss or gradient norm is NaN or infinite, before it is logged or its weights are saved.

    Raises:
        TrainingDiverged: a value is not finite; the message names the last good checkpoint.
    """
    if math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm)):
        return
    run.writer.join()  # the last checkpoint may still be being written
    last = latest_checkpoint(run.checkpoints_dir)
    way_out = f"The last good checkpoint is {last}." if last else "There is no checkpoint before it."
    norm = "" if grad_norm is None else f", gradient norm {grad_norm}"
    raise TrainingDiverged(
        f"stage {progress.stage_index}, after step {progress.step}: loss {loss}{norm}. {way_out} "
        "Lower optim.learning_rate or raise optim.warmup_ratio, and start again: the run resumes from there.",
        stage=progress.stage_index,
        step=progress.step,
        loss=loss,
        grad_norm=grad_norm,
        checkpoint=None if last is None else str(last),
    )


def _alive(run: RunContext, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches and tell the watchdog before each that this rank is alive."""
    for batch in batches:
        run.world.alive()
        yield batch
