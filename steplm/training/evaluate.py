"""Validation losses inside a run, and the refusal of a loss that is not finite."""

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

PROBE_WINDOWS = 32  # validation windows on which the loss around merge and growth is compared


def evaluate(run: RunContext, progress: TrainState, model: PreTrainedModel) -> float:
    """Validation loss, logged and shown; of several validation sets the first one's, and all in the log.

    Raises:
        TrainingDiverged: it is not finite.
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
    """Mean loss on the same few validation windows at every call."""
    return validation_loss(run, model, PROBE_WINDOWS * run.config.train.sequence_length)


def validation_loss(
    run: RunContext, model: PreTrainedModel, max_tokens: int | None = None, *, name: str | None = None
) -> float:
    """Mean over so many validation tokens, by default those of an evaluation; each rank computes its share.

    Args:
        name: of the validation set; default: the first.
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
    """Stop before a loss that is NaN or infinite is trained on, logged or saved.

    Raises:
        TrainingDiverged: it is; the last good checkpoint is named.
    """
    if math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm)):
        return
    run.writer.join()  # the last one may still be on its way to the disk
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
    """The batches, each a sign of life for the watchdog."""
    for batch in batches:
        run.world.alive()
        yield batch
