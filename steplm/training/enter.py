"""Enter a phase: prepare the plain tensors it starts from and run the checks before its first step.

Merge and growth act on plain tensors, before the phase's model is assembled.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from steplm.checkpoint import Checkpoint
from steplm.cost.measure import check_against_plan, comparable, measure_model_state, measure_peak, reset_peak
from steplm.cost.rules import RULES
from steplm.growth.grow import grow, layer_prefix_of, provenance, renamed
from steplm.growth.operators import OPERATORS, require_row_wise
from steplm.models.build import DTYPES, fresh_layers, grown_config, initial_state
from steplm.models.folder import load_config_and_state
from steplm.optim.adamw import carry_state, inherited_state
from steplm.optim.build import UpdateRules, reassign, rule_of_each
from steplm.optim.restart import kept_moments
from steplm.pet.adapters import merge_state
from steplm.pet.trainable import apply_trainable
from steplm.schedule import Phase, trained_patterns
from steplm.training.assemble import Assembled, PhaseStart, packed_rows, probe_model
from steplm.training.checks import phase_config
from steplm.training.context import RunContext
from steplm.training.evaluate import probe_loss
from steplm.training.peak_meter import peak_meter_for
from steplm.training.step import StepOptions, forward_backward, step_options, trial
from steplm.types import LayerMap, LayerProvenance, TrainState, to_json


def enter(run: RunContext, phase: Phase, before: Checkpoint | None) -> PhaseStart:
    """Initial weights, the weights of the checkpoint when resuming, or the merged and grown weights.

    Args:
        before: checkpoint to continue from, of this phase or the previous one; None at the start of a run.
    """
    reset_peak(run.device)
    if before is None:
        return _first_start(run, phase)
    state = before.state
    if state.progress.phase_index == phase.index:
        return PhaseStart(
            hf_config=before.config,
            weights=before.weights,
            provenance=state.provenance,
            progress=state.progress,
            adapters=before.adapters,
            optimizer=before.optimizer,
            optimizer_steps=state.optimizer_steps,
            unlogged_losses=state.unlogged_losses,
            unlogged_sources=state.unlogged_sources,
            trained_names=state.trained_names,
        )
    if phase.entry.kind == "go_on":
        return PhaseStart(
            hf_config=before.config,
            weights=before.weights,
            provenance=state.provenance,
            progress=next_phase(phase, state.progress),
            optimizer=before.optimizer,
            optimizer_steps=state.optimizer_steps,
            unlogged_losses=state.unlogged_losses,
            unlogged_sources=state.unlogged_sources,
        )
    return _later_start(run, phase, before)


def go_on(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> None:
    """Continue with the assembled model, and change which parameters are trained.

    Raises:
        MemoryMismatch: the measured bytes of the model state differ from the plan.
    """
    model, prefix = assembled.model, layer_prefix_of(name for name, _ in assembled.model.named_parameters())
    assembled.rules.zero_grad()
    apply_trainable(model, trained_patterns(phase, run.plan.shape))
    reassign(assembled.rules, run.config, model, phase, prefix)
    start.progress = next_phase(phase, start.progress)
    everything = measure_model_state(
        model,
        assembled.rules,
        phase.num_hidden_layers,
        host=assembled.rules.host,
        packed=packed_rows(model),
        expect_gradients=not run.config.memory.fused_backward,
    )
    check_against_plan(everything, run.plan.cost(phase).memory)


def next_phase(phase: Phase, progress: TrainState) -> TrainState:
    """Progress at the start of a phase, given the progress at the end of the previous one."""
    step = progress.step if progress.stage_index == phase.stage else 0
    return replace(
        progress,
        stage_index=phase.stage,
        phase_index=phase.index,
        step=step,
        phase_step=0,
        phase_done=False,
        stage_done=False,
    )


def _first_start(run: RunContext, phase: Phase) -> PhaseStart:
    dtype = DTYPES[run.config.train.precision]
    with run.world.in_turn():  # the whole model is in host memory until it is sharded
        if run.config.init_from is None:
            config = phase_config(run.config, run.plan.schedule, phase)
            weights = initial_state(config, seed=run.config.seed, dtype=dtype)
        else:
            config, weights = load_config_and_state(run.config.init_from, dtype=dtype)
            config.use_cache = False
        weights = {name: run.world.rows.cut(tensor) for name, tensor in weights.items()}
    origins = tuple(LayerProvenance(1, (), None) for _ in range(phase.num_hidden_layers))
    return PhaseStart(config, weights, origins, TrainState(phase.stage, phase.index, 0, 0, 0))


def _later_start(run: RunContext, phase: Phase, before: Checkpoint) -> PhaseStart:
    """Merge adapters, then grow if the phase grows; log the loss before and after each."""
    state, entry, weights = before.state, phase.entry, before.weights
    tokens_seen = state.progress.tokens_seen
    if state.phase.has_adapters:
        weights = merge_state(weights, before.adapters, state.phase, run.world.rows)
    loss_merged = probe_loss(run, probe_model(run.config, before.config, weights, run.world))
    run.metrics.write(
        "merge",
        stage=state.progress.stage_index,
        tokens_seen=tokens_seen,
        loss_before=state.probe_loss,
        loss_after=loss_merged,
    )
    layer_map = entry.layer_map or LayerMap.identity(state.phase.num_hidden_layers)
    optimizer, steps = _kept_optimizer(run, phase, before, renamed(weights, layer_map))
    start = PhaseStart(
        hf_config=before.config,
        weights=weights,
        provenance=state.provenance,
        progress=next_phase(phase, state.progress),
        optimizer=optimizer,
        optimizer_steps=steps,
        unlogged_losses=state.unlogged_losses if phase.stage == state.progress.stage_index else (),
        unlogged_sources=state.unlogged_sources if phase.stage == state.progress.stage_index else (),
        probe_loss=loss_merged,
    )
    if entry.operator is None:
        run.display.restart(phase, state.probe_loss, loss_merged)
        return start
    if run.config.init_from is None:
        start.hf_config = phase_config(run.config, run.plan.schedule, phase)
    else:  # the layers are configured as in the given model
        start.hf_config = grown_config(before.config, layer_map)
    fresh = fresh_layers(start.hf_config, seed=run.config.seed + phase.stage, dtype=DTYPES[run.config.train.precision])
    require_row_wise(entry.operator, run.world.rows)
    cut = run.world.rows.cut  # growing a rank's rows gives its rows of the grown model
    start.weights = grow(
        weights,
        layer_map,
        entry.operator,
        fresh_layer=lambda index: {name: cut(tensor) for name, tensor in fresh(index).items()},
    )
    start.provenance = provenance(state.provenance, layer_map, phase.stage, entry.operator)
    start.probe_loss = probe_loss(run, probe_model(run.config, start.hf_config, start.weights, run.world))
    run.metrics.write(
        "growth",
        stage=phase.stage,
        tokens_seen=tokens_seen,
        loss_before=loss_merged,
        loss_after=start.probe_loss,
        operator=entry.operator,
        position=run.config.growth.resolved_position,
    )
    run.display.growth(phase, run.config.growth, state.probe_loss, loss_merged, start.probe_loss)
    return start


def _kept_optimizer(
    run: RunContext, phase: Phase, before: Checkpoint, names_after: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The optimizer states that the phase keeps: those of weights still trained by the same rule, and of adapters."""
    saved, steps, config = before.optimizer, before.state.optimizer_steps, run.config
    grows = phase.entry.kind == "grow"
    kept: dict[str, Tensor] = {}
    kept_steps: dict[str, int] = {}
    if config.optim.keep_state_at_growth or not grows:
        kept, kept_steps = carry_state(saved, steps, _under_the_same_rule(run, phase, before, names_after))
    if grows and config.growth.optimizer_states == "parents":
        of_new, of_new_steps = inherited_state(saved, steps, _parents_under_the_same_rule(run, phase, before))
        kept, kept_steps = kept | of_new, kept_steps | of_new_steps
    if not grows and config.pet.restart_keep:
        names = [name for name in steps if name in before.adapters]
        kept |= kept_moments(saved, names, config.pet.restart_keep)
        kept_steps |= {name: steps[name] for name in names}
    return kept, kept_steps


def _under_the_same_rule(
    run: RunContext, phase: Phase, before: Checkpoint, names_after: dict[str, str]
) -> dict[str, str]:
    """Drop weights whose update rule changes in this phase, because states differ between rules."""
    prefix, linears = layer_prefix_of(names_after), {linear.name for linear in run.plan.shape.linears}
    shapes = {name: tuple(before.weights[name].shape) for name in names_after}
    old = rule_of_each(shapes, before.state.phase, prefix, linears, run.config)
    shapes_after = {new: shapes[name] for name, new in names_after.items()}
    new = rule_of_each(shapes_after, phase, prefix, linears, run.config)
    return {name: after for name, after in names_after.items() if old[name] == new[after]}


def _parents_under_the_same_rule(
    run: RunContext, phase: Phase, before: Checkpoint
) -> dict[str, tuple[list[str], float]]:
    """For each new-layer weight with the same update rule as its parents: the parents' names and their mix fraction."""
    layer_map, operator = phase.entry.layer_map, phase.entry.operator
    assert layer_map is not None
    assert operator is not None
    if OPERATORS[operator].fresh:
        return {}
    prefix, linears = layer_prefix_of(before.weights), {linear.name for linear in run.plan.shape.linears}
    shapes = {name: tuple(weight.shape) for name, weight in before.weights.items()}
    rules_before = rule_of_each(shapes, before.state.phase, prefix, linears, run.config)
    found = {}
    for index in layer_map.new_layers:
        origin = layer_map.origins[index]
        mixes = operator == "interpolation_mean" and len(origin.parents) > 1
        own, *others = [f"{prefix}.{parent}." for parent in (origin.parents if mixes else origin.parents[:1])]
        for name, shape in shapes.items():
            if not name.startswith(own):
                continue
            below, new = name.removeprefix(own), f"{prefix}.{index}.{name.removeprefix(own)}"
            of = [name, *(f"{other}{below}" for other in others)]
            rule = rule_of_each({new: shape}, phase, prefix, linears, run.config)[new]
            if all(rules_before[parent] == rule for parent in of) and RULES[rule].inheritable:
                found[new] = of, origin.fraction if mixes else 0.0
    return found


def check_entrance(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> None:
    """Do a dry run without an update, then compare measured bytes with planned bytes.

    A resume in the middle of a phase is checked too, but its events are already in the log and not logged again.

    Raises:
        MemoryMismatch: measured and planned bytes differ.
    """
    model, rules, train, cost = assembled.model, assembled.rules, run.config.train, run.plan.cost(phase)
    entrance_peak = measure_peak(run.device)  # of merge, growth and assembly
    reset_peak(run.device)
    options = step_options(run.config, run.world)
    measured_peak, library_bytes = _dry_run(run, model, rules, options) if train.dry_run else (None, 0)
    everything = measure_model_state(
        model,
        rules,
        phase.num_hidden_layers,
        host=rules.host,
        packed=packed_rows(model),
        expect_gradients=not (train.dry_run or options.fused_backward),
    )
    rules.zero_grad()
    measured = comparable(everything, cost.memory)
    bytes_of_ranks = run.world.gather(measured.total_bytes)
    if run.world.rows.index == 0:  # its shards are the largest; other ranks may have fewer rows
        check_against_plan(everything, cost.memory)
    if start.progress.phase_step == 0 and phase.entry.kind != "go_on":
        _report_packing(run, phase, start, assembled)
        run.metrics.write(
            "stage_start",
            stage=phase.stage,
            phase=phase.index,
            tokens_seen=start.progress.tokens_seen,
            num_hidden_layers=phase.num_hidden_layers,
            planned_bytes=cost.memory.by_kind(),
            measured_bytes=measured.by_kind(),
            planned_peak_bytes=None if cost.peak is None else cost.peak.total_bytes,
            planned_dry_run_bytes=None if cost.peak is None else cost.peak.highest_in_a_pass.memory.total_bytes,
            measured_dry_run_bytes=measured_peak,
            measured_library_bytes=library_bytes,
            **({} if run.world.is_alone else {"measured_bytes_of_ranks": [round(count) for count in bytes_of_ranks]}),
            **{f"entrance_{name}": value for name, value in to_json(entrance_peak).items()},
        )
    run.display.phase_start(phase, cost, measured, measured_peak, library_bytes)


def _dry_run(
    run: RunContext, model: PreTrainedModel, rules: UpdateRules, options: StepOptions
) -> tuple[int | None, int]:
    """Run a step without its update; gradients are kept, except with ``fused_backward``.

    Returns:
        Peak bytes of tensors on the device (None if unknown), and bytes of library workspaces.
    """
    train = run.config.train
    # Two micro-batches if the step has that many: the second runs on top of the gradients of the first.
    num_sequences = run.config.micro_batch_size * min(2, run.config.micro_batches)
    batch = run.loader.batch(0, num_sequences)
    # The count does not see tensors inside compiled layers, or the buffers into which sharded layers gather weights.
    counts = run.device.type == "cuda" or (run.world.is_alone and not train.compile)
    with peak_meter_for(run.device) if counts else nullcontext() as meter:
        if meter is not None:
            meter.watch(model, rules)
            meter.reset()
        if options.fused_backward:
            trial(model, rules, batch, options)
        else:
            forward_backward(model, batch, options)
        if meter is None:
            return None, 0
        peak_bytes, library_bytes = meter.peak_bytes, meter.library_bytes()
        # With updates fused into backward, a real step has another peak than this dry run.
        return None if options.fused_backward else peak_bytes - library_bytes, library_bytes


def _report_packing(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> None:
    """Log the cost of quantizing frozen weights: the weight error, and the loss before and after."""
    packing = assembled.packing
    if not packing.relative_rms_error:
        return
    loss = probe_loss(run, assembled.model)
    run.metrics.write(
        "pack",
        stage=phase.stage,
        tokens_seen=start.progress.tokens_seen,
        format=run.config.memory.frozen_weights,
        num_matrices=packing.num_matrices,
        relative_rms_error=packing.relative_rms_error,
        loss_before=start.probe_loss,
        loss_after=loss,
    )
    run.display.packing(run.config.memory.frozen_weights, packing.relative_rms_error, start.probe_loss, loss)
