"""Capture the state of a phase: as a checkpoint on disk, or in memory for the next phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from steplm.checkpoint import (
    Checkpoint,
    CheckpointState,
    checkpoint_name,
    prune_checkpoints,
    save_checkpoint,
    save_shards,
)
from steplm.checkpoint.shards import BackgroundWriter
from steplm.distributed.shard import as_global
from steplm.distributed.world import World
from steplm.models.build import plain_state
from steplm.pet.adapters import adapter_state
from steplm.pet.frozen import unpacked_state
from steplm.rows import on_this_rank
from steplm.schedule import Phase
from steplm.training.assemble import Assembled, PhaseStart
from steplm.training.context import RunContext
from steplm.training.evaluate import probe_loss
from steplm.training.rates import last_stable_step
from steplm.types import TrainState


def save(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> Path:
    """Write a checkpoint of the current state and prune older ones, both in the background."""
    model, rules = assembled.model, assembled.rules
    with run.world.patiently():  # the previous checkpoint may still be being written
        run.writer.wait()
    adapters = adapter_state(model)
    tensors, _ = rules.state_dict()
    run.metrics.sync()
    state = _state(run, phase, start, assembled, probes=start.progress.phase_done)
    weights = {name: tensor for name, tensor in plain_state(model).items() if name not in adapters}
    if not isinstance(run.writer, BackgroundWriter):
        return save_checkpoint(
            run.checkpoints_dir,
            config=start.hf_config,
            # Packed weights are saved dequantized: packing them again gives the same codes.
            weights=copied_to_cpu(weights) | unpacked_state(model),
            adapters=copied_to_cpu(adapters),
            optimizer=copied_to_cpu(tensors),
            state=state,
            background=run.writer,
            then=lambda: _prune(run),
        )
    return save_shards(
        run.checkpoints_dir,
        run.writer,
        config=start.hf_config,
        weights=weights | unpacked_state(model),
        adapters=adapters,
        optimizer={
            key: as_global(state, run.world, _num_rows(state, rules.parameters[key.rpartition(".")[0]], run.world))
            for key, state in tensors.items()
        },
        state=state,
        then=lambda: _prune(run),
    )


def _num_rows(state: Tensor, parameter: Tensor, world: World) -> int:
    """Rows of a sharded state over all ranks: the parameter's, or equal shares of blocks that continue across rows."""
    return len(parameter) if len(state) == len(on_this_rank(parameter)) else len(state) * world.rows.count


def in_memory(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> Checkpoint:
    """The state from which the next phase of the same stage starts when no checkpoint is due."""
    model = assembled.model
    adapters = {name: _whole(tensor) for name, tensor in adapter_state(model).items()}
    weights = {name: on_this_rank(t) for name, t in plain_state(model).items() if name not in adapters}
    return Checkpoint(
        path=None,
        config=start.hf_config,
        weights=_on_cpu(weights) | unpacked_state(model),
        adapters=_on_cpu(adapters),
        optimizer=_on_cpu(assembled.rules.state_dict()[0]),
        state=_state(run, phase, start, assembled, probes=True),
    )


def _state(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled, *, probes: bool) -> CheckpointState:
    return CheckpointState(
        progress=start.progress,
        schedule_hash=run.plan.schedule.hash_until(phase.index),
        phase=phase,
        data_fingerprint=run.manifest.fingerprint,
        provenance=start.provenance,
        trained_names=tuple(assembled.rules.parameters),
        optimizer_steps=assembled.rules.steps,
        metrics_bytes=run.metrics.num_bytes,
        elapsed_seconds=run.elapsed_seconds,
        unlogged_losses=tuple(start.log.unlogged_losses),
        unlogged_sources=tuple(start.log.unlogged_sources),
        probe_loss=probe_loss(run, assembled.model) if probes else None,
    )


def _prune(run: RunContext) -> None:
    """Keep the latest checkpoints and the one from which the run can be extended; delete the others."""
    stage, step = run.plan.num_stages, last_stable_step(run.config, run.plan.schedule)
    keep = None if step is None else checkpoint_name(TrainState(stage, 0, step, 0, 0))
    prune_checkpoints(run.checkpoints_dir, run.config.train.save_total_limit, keep)


def copied_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that can be written in the background while training changes the originals."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _whole(tensor: Any) -> Tensor:
    """The full tensor, gathered if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
