"""One stage: from the last checkpoint to this stage's start, checks, and trained end.

Growth acts on plain tensors, before the stage's model is assembled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steplm.checkpoint import (
    Checkpoint,
    CheckpointState,
    load_checkpoint,
    save_checkpoint,
    save_shards,
)
from steplm.distributed.shard import as_global
from steplm.errors import SteplmError, TrainingDiverged
from steplm.growth.grow import grow, grow_config, layer_prefix_of, provenance, renamed
from steplm.cost.measure import check_against_plan, comparable, measure_model_state, measure_peak, reset_peak
from steplm.models.build import DTYPES, config_values, fresh_layers, hf_config, initial_state, plain_state
from steplm.models.folder import load_config_and_state
from steplm.optim.adamw import AdamW, carry_state
from steplm.optim.low_rank import has_low_rank_states
from steplm.optim.restart import kept_moments
from steplm.optim.schedules import learning_rate
from steplm.pet.adapters import adapter_state, merge_state
from steplm.pet.frozen import unpacked_state
from steplm.training.assemble import Assembled, StageStart, packed_rows, probe_model
from steplm.training.peak_meter import gauge_for
from steplm.training.step import Pass, StepReport, forward_backward, train_step, trial
from steplm.types import LayerProvenance, Stage, TrainState, to_json
from steplm.units import format_bytes

if TYPE_CHECKING:
    from steplm.training.run import Run

PROBE_WINDOWS = 32  # validation windows on which the loss around merge and growth is compared


def enter_stage(run: Run, stage: Stage, checkpoint_path: Path | None) -> StageStart:
    """Fresh or given weights (stage 1), the checkpoint's (resume), or the merged and grown ones (a later stage)."""
    reset_peak(run.device)
    if checkpoint_path is None:
        return _first_start(run, stage)
    checkpoint = load_checkpoint(checkpoint_path, rows=run.world.rows, verify=False)  # verified when it was chosen
    if checkpoint.state.progress.stage_index == stage.index:
        return StageStart(
            hf_config=checkpoint.config,
            weights=checkpoint.weights,
            provenance=checkpoint.state.provenance,
            progress=checkpoint.state.progress,
            adapters=checkpoint.adapters,
            optimizer=checkpoint.optimizer,
            optimizer_steps=checkpoint.state.optimizer_steps,
            unlogged_losses=checkpoint.state.unlogged_losses,
            trained_names=checkpoint.state.trained_names,
        )
    return _later_start(run, stage, checkpoint)


def _first_start(run: Run, stage: Stage) -> StageStart:
    dtype = DTYPES[run.config.train.precision]
    with run.world.in_turn():  # the whole model, in host memory, until it is cut
        if run.config.init_from is None:
            config = hf_config(run.config.model.hf_config(), stage.num_hidden_layers)
            weights = initial_state(config, seed=run.config.seed, dtype=dtype)
        else:
            config, weights = load_config_and_state(run.config.init_from, dtype=dtype)
            config.use_cache = False
        weights = {name: run.world.rows.cut(tensor) for name, tensor in weights.items()}
    origins = tuple(LayerProvenance(1, (), None) for _ in range(stage.num_hidden_layers))
    return StageStart(config, weights, origins, TrainState(stage.index, 0, 0, 0))


def _later_start(run: Run, stage: Stage, checkpoint: Checkpoint) -> StageStart:
    """Merge, then grow if the stage does; the loss before and after each is logged."""
    assert stage.layer_map is not None
    state = checkpoint.state
    tokens_seen = state.progress.tokens_seen
    operator = run.config.growth.operator
    weights = checkpoint.weights
    if state.adapters is not None:
        weights = merge_state(weights, checkpoint.adapters, state.adapters, run.world.rows)
    loss_merged = probe_loss(run, probe_model(run.config, checkpoint.config, weights, run.world))
    run.metrics.write(
        "merge",
        stage=state.progress.stage_index,
        tokens_seen=tokens_seen,
        loss_before=state.probe_loss,
        loss_after=loss_merged,
    )
    optimizer, steps = _kept_optimizer(run, stage, checkpoint, renamed(weights, stage.layer_map))
    progress = TrainState(stage.index, 0, 0, tokens_seen)
    if not stage.grows:
        run.display.restart(stage, state.probe_loss, loss_merged)
        return StageStart(
            hf_config=checkpoint.config,
            weights=weights,
            provenance=state.provenance,
            progress=progress,
            optimizer=optimizer,
            optimizer_steps=steps,
            probe_loss=loss_merged,
        )
    grown_config = hf_config(grow_config(config_values(checkpoint.config), stage.layer_map))
    # The index among growths, not among stages: restarts must not change what is drawn.
    fresh = fresh_layers(
        grown_config, seed=run.config.seed + stage.num_growths + 1, dtype=DTYPES[run.config.train.precision]
    )
    cut = run.world.rows.cut  # no operator mixes rows: what grows out of a rank's rows are the rows of the whole
    grown = grow(
        weights,
        stage.layer_map,
        operator,
        fresh_layer=lambda index: {name: cut(tensor) for name, tensor in fresh(index).items()},
    )
    loss_grown = probe_loss(run, probe_model(run.config, grown_config, grown, run.world))
    run.metrics.write(
        "growth",
        stage=stage.index,
        tokens_seen=tokens_seen,
        loss_before=loss_merged,
        loss_after=loss_grown,
        operator=operator,
        position=run.config.growth.resolved_position,
    )
    run.display.growth(stage, run.config.growth, state.probe_loss, loss_merged, loss_grown)
    return StageStart(
        hf_config=grown_config,
        weights=grown,
        provenance=provenance(state.provenance, stage.layer_map, stage.index, operator),
        progress=progress,
        optimizer=optimizer,
        optimizer_steps=steps,
        probe_loss=loss_grown,
    )


def _kept_optimizer(
    run: Run, stage: Stage, checkpoint: Checkpoint, names_after: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What outlives the beginning of a stage: states of weights that may go on being trained, and of adapters."""
    saved, steps, config = checkpoint.optimizer, checkpoint.state.optimizer_steps, run.config
    kept: dict[str, Tensor] = {}
    kept_steps: dict[str, int] = {}
    if config.optim.keep_state_at_growth or not stage.grows:
        kept, kept_steps = carry_state(saved, steps, _of_the_same_form(run, stage, checkpoint.weights, names_after))
    if not stage.grows and config.pet.restart_keep:
        names = [name for name in steps if name in checkpoint.adapters]
        kept |= kept_moments(saved, names, config.pet.restart_keep)
        kept_steps |= {name: steps[name] for name in names}
    return kept, kept_steps


def _of_the_same_form(
    run: Run, stage: Stage, weights: dict[str, Tensor], names_after: dict[str, str]
) -> dict[str, str]:
    """Without the matrices that had AdamW's states before the growth and have low-rank ones after it."""
    layer_map, before = stage.layer_map, run.plan.stages[stage.index - 2].low_rank_layers
    assert layer_map is not None
    kept = enumerate(layer_map.kept_layers)
    changed = [new for old, new in kept if new in stage.low_rank_layers and old not in before]
    prefix, rank = layer_prefix_of(names_after), run.config.optim.state_rank
    linears = {linear.name for linear in run.plan.shape.linears}
    return {
        old: new
        for old, new in names_after.items()
        if not has_low_rank_states(new, tuple(weights[old].shape), prefix, rank, linears, changed)
    }


def check_entrance(run: Run, stage: Stage, start: StageStart, assembled: Assembled) -> None:
    """A dry run without an update, then planned bytes against measured bytes.

    Checked at a resume in the middle of a stage too, where the events are in the log already.

    Raises:
        MemoryMismatch: they are not equal.
    """
    model, optimizer, train = assembled.model, assembled.optimizer, run.config.train
    is_new = start.progress.step == 0
    entrance_peak = measure_peak(run.device)  # of merge, growth and assembly
    reset_peak(run.device)
    how = way_of_passing(run)
    measured_peak, library_bytes = _dry_run(run, model, optimizer, how) if train.dry_run else (None, 0)
    everything = measure_model_state(
        model, optimizer, stage, packed=packed_rows(model), expect_gradients=not (train.dry_run or how.fused_backward)
    )
    optimizer.zero_grad()
    measured = comparable(everything, stage.memory)
    bytes_of_ranks = run.world.gather(measured.total_bytes)
    if run.world.rows.index == 0:  # it has the most rows of every tensor; others may have fewer
        check_against_plan(everything, stage.memory)
    if is_new:
        _report_packing(run, stage, start, assembled)
        run.metrics.write(
            "stage_start",
            stage=stage.index,
            tokens_seen=start.progress.tokens_seen,
            num_hidden_layers=stage.num_hidden_layers,
            planned_bytes=stage.memory.by_kind(),
            measured_bytes=measured.by_kind(),
            planned_peak_bytes=None if stage.peak is None else stage.peak.total_bytes,
            planned_dry_run_bytes=None if stage.peak is None else stage.peak.highest_in_a_pass.memory.total_bytes,
            measured_dry_run_bytes=measured_peak,
            measured_library_bytes=library_bytes,
            **({} if run.world.is_alone else {"measured_bytes_of_ranks": [round(count) for count in bytes_of_ranks]}),
            **{f"entrance_{name}": value for name, value in to_json(entrance_peak).items()},
        )
    run.display.stage_start(stage, measured, measured_peak, library_bytes)


def _dry_run(run: Run, model: PreTrainedModel, optimizer: AdamW, how: Pass) -> tuple[int | None, int]:
    """A step without its update, gradients left.

    Returns:
        The most bytes of tensors that the device held, if that can be told, and those of libraries' workspaces.
    """
    train = run.config.train
    # Two micro-batches where there are as many: the second meets the gradients of the first.
    num_sequences = run.config.micro_batch_size * min(2, run.config.micro_batches)
    batch = run.loader.batch(0, num_sequences)
    # A compiled layer hides its tensors from a count, and a sharded one keeps what it gathers in storages of its own.
    counts = run.device.type == "cuda" or (run.world.is_alone and not train.compile)
    with gauge_for(run.device) if counts else nullcontext() as gauge:
        if gauge is not None:
            gauge.watch(model, optimizer)
            gauge.reset()
        if how.fused_backward:
            trial(model, optimizer, batch, how)
        else:
            forward_backward(model, batch, how)
        if gauge is None:
            return None, 0
        peak_bytes, library_bytes = gauge.peak_bytes, gauge.library_bytes()
        # It updates nothing: where updates are a part of the pass, its peak is another.
        return None if how.fused_backward else peak_bytes - library_bytes, library_bytes


def _report_packing(run: Run, stage: Stage, start: StageStart, assembled: Assembled) -> None:
    """What the packed format costs: the error of the weights, and the loss before and after."""
    packing = assembled.packing
    if not packing.relative_rms_error:
        return
    loss = probe_loss(run, assembled.model)
    run.metrics.write(
        "pack",
        stage=stage.index,
        tokens_seen=start.progress.tokens_seen,
        format=run.config.memory.frozen_weights,
        num_matrices=packing.num_matrices,
        relative_rms_error=packing.relative_rms_error,
        loss_before=start.probe_loss,
        loss_after=loss,
    )
    run.display.packing(stage, run.config.memory.frozen_weights, packing.relative_rms_error, start.probe_loss, loss)


@contextmanager
def memory_errors(run: Run, stage: Stage) -> Iterator[None]:
    """Out of memory, on any device, becomes one message that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # On a CPU PyTorch has no class for it.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        train = run.config.train
        raise SteplmError(
            f"stage {stage.index} ran out of memory ({str(error).splitlines()[0]}). Its model state takes "
            f"{format_bytes(stage.memory.total_bytes)}, and its planned peak, with micro-batches of "
            f"{train.per_device_train_batch_size} x {train.sequence_length} tokens, is "
            f"{format_bytes(stage.device_bytes) if stage.peak else 'not known'}. "
            "Lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps by the same factor, "
            "or set train.gradient_checkpointing=true or memory.offload_activations=true: the run then resumes where "
            "it is. For a new run, `steplm fit` lists what would fit.",
            stage=stage.index,
            model_state_bytes=stage.memory.total_bytes,
        ) from None


def train_stage(run: Run, stage: Stage, start: StageStart, assembled: Assembled) -> Path:
    """Steps until the stage's tokens are seen, or a signal asks to stop; returns the last checkpoint."""
    config = run.config
    model, optimizer, how = assembled.model, assembled.optimizer, way_of_passing(run)
    train, optim, world = config.train, config.optim, run.world
    step_tokens = config.step_tokens
    num_steps = stage.tokens // step_tokens
    start_step = stage.schedule_start_tokens // step_tokens
    scheduled_steps = max(stage.scheduled_tokens // step_tokens, start_step + num_steps)
    save_steps = train.save_steps or max(num_steps // 5, 1)
    eval_steps = config.eval.eval_steps or max(num_steps // 10, 1)
    progress = start.progress
    last_logged_at, last_logged_step = time.monotonic(), progress.step
    unlogged = list(start.unlogged_losses)
    path: Path | None = None

    while progress.step < num_steps:
        rate = learning_rate(
            progress.step,
            num_steps=scheduled_steps,
            warmup_steps=round(optim.warmup_ratio * (num_steps if start_step else scheduled_steps)),
            base_warmup_steps=round(optim.warmup_ratio * scheduled_steps),
            decay_steps=round(optim.decay_ratio * scheduled_steps),
            peak=config.learning_rate(stage.num_growths),
            start=start_step,
            min_ratio=optim.min_lr_ratio,
            kind=optim.lr_scheduler_type,
        )
        # Dropout, where a model has it, is a function of the position too: a resumed run draws the same. Replicas draw
        # alike, as stochastic rounding must give them the same weights.
        torch.manual_seed(config.seed * 1_000_003 + progress.tokens_seen + world.rows.index)
        result = train_step(
            model,
            optimizer,
            run.loader.batch(progress.tokens_seen, config.global_batch_size, world.rank, world.size),
            how,
            learning_rate=rate,
            max_grad_norm=optim.max_grad_norm,
        )
        require_finite(run, stage, progress, result.loss, result.grad_norm)
        progress = replace(
            progress,
            step=progress.step + 1,
            stage_tokens_seen=progress.stage_tokens_seen + step_tokens,
            tokens_seen=progress.tokens_seen + step_tokens,
        )
        unlogged.append(result.loss)
        at_end = progress.step == num_steps
        if progress.step % config.log.logging_steps == 0 or at_end:
            now = time.monotonic()
            speed = (progress.step - last_logged_step) * step_tokens / max(now - last_logged_at, 1e-9)
            mean = replace(result, loss=math.fsum(unlogged) / len(unlogged))
            peak = measure_peak(run.device)
            run.log_step(StepReport(stage, progress, num_steps, mean, rate, speed, peak))
            unlogged.clear()
            last_logged_at, last_logged_step = now, progress.step
        paused_at = time.monotonic()
        if progress.step % eval_steps == 0 or at_end:
            run.evaluate(stage, progress, model)
        if at_end:
            progress = replace(progress, stage_done=True)
        run.agree_to_stop()
        if progress.step % save_steps == 0 or at_end or run.stop_signal:
            # The loss of a step says nothing about the weights that its update makes: before they are saved as
            # good, they are tried on the sequence that comes next.
            batch = run.loader.batch(progress.tokens_seen, 1)
            require_finite(run, stage, progress, *trial(model, optimizer, batch, how))
            if at_end:
                run.metrics.write("stage_end", stage=stage.index, step=progress.step, tokens_seen=progress.tokens_seen)
            path = save(run, stage, start, model, optimizer, progress, tuple(unlogged))
        last_logged_at += time.monotonic() - paused_at  # speed counts training alone
        if run.stop_signal:
            break
    assert path is not None
    if run.writer is not None:
        with world.patiently():
            run.writer.wait()
    return path


def save(
    run: Run,
    stage: Stage,
    start: StageStart,
    model: PreTrainedModel,
    optimizer: AdamW,
    progress: TrainState,
    unlogged_losses: tuple[float, ...] = (),
) -> Path:
    """Write a checkpoint of this instant and prune the older ones; with several ranks, while training goes on."""
    adapters = adapter_state(model)
    tensors, steps = optimizer.state_dict()
    run.metrics.sync()
    state = CheckpointState(
        progress=progress,
        plan_hash=run.plan.hash_until(stage.index),
        data_fingerprint=run.manifest.fingerprint,
        provenance=start.provenance,
        trained_names=tuple(optimizer.parameters),
        adapters=stage.adapters,
        optimizer_steps=steps,
        metrics_bytes=run.metrics.num_bytes,
        elapsed_seconds=run.elapsed_seconds,
        unlogged_losses=unlogged_losses,
        probe_loss=probe_loss(run, model) if progress.stage_done else None,
    )
    weights = {name: tensor for name, tensor in plain_state(model).items() if name not in adapters}
    if run.writer is None:
        path = save_checkpoint(
            run.checkpoints_dir,
            config=start.hf_config,
            # Packed weights are saved whole: packed again, they give the same codes.
            weights=_on_cpu(weights) | dict(unpacked_state(model)),
            adapters=_on_cpu(adapters),
            optimizer=_on_cpu(tensors),
            state=state,
        )
        run.prune_checkpoints()
        return path
    with run.world.patiently():  # the one before may still be on its way to the disk
        run.writer.wait()
    num_rows = {name: len(parameter) for name, parameter in optimizer.parameters.items() if parameter.ndim}
    return save_shards(
        run.checkpoints_dir,
        run.writer,
        config=start.hf_config,
        weights=weights | dict(unpacked_state(model)),
        adapters=adapters,
        optimizer={key: as_global(t, run.world, num_rows[key.rpartition(".")[0]]) for key, t in tensors.items()},
        state=state,
        then=run.prune_checkpoints,
    )


def probe_loss(run: Run, model: PreTrainedModel) -> float:
    """Mean loss on the same few validation windows at every call."""
    return run.validation_loss(model, PROBE_WINDOWS * run.config.train.sequence_length)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def way_of_passing(run: Run) -> Pass:
    """How every forward and backward pass of a run is computed."""
    config = run.config
    return Pass(
        micro_batch_size=config.train.per_device_train_batch_size,
        chunk_size=config.train.loss_chunk_size,
        offload_activations=config.memory.offload_activations,
        fused_backward=config.memory.fused_backward,
        world=run.world,
    )


def require_finite(run: Run, stage: Stage, progress: TrainState, loss: float, grad_norm: float | None = None) -> None:
    """Stop before a loss that is NaN or infinite is trained on, logged or saved.

    Raises:
        TrainingDiverged: it is; the last good checkpoint is named.
    """
    if math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm)):
        return
    last = run.last_checkpoint
    way_out = f"The last good checkpoint is {last}." if last else "There is no checkpoint before it."
    norm = "" if grad_norm is None else f", gradient norm {grad_norm}"
    raise TrainingDiverged(
        f"stage {stage.index}, after step {progress.step}: loss {loss}{norm}. {way_out} "
        "Lower optim.learning_rate or raise optim.warmup_ratio, and start again: the run resumes from there.",
        stage=stage.index,
        step=progress.step,
        loss=loss,
        grad_norm=grad_norm,
        checkpoint=None if last is None else str(last),
    )
