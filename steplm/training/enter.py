"""Enter a phase: prepare the plain tensors it starts from and run the checks before its first step.

Merge and growth act on plain tensors, before the phase's model is assembled.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from steplm.checkpoint import Checkpoint
from steplm.cost.measure import check_against_plan, comparable, measure_model_state, measure_peak, reset_peak
from steplm.cost.rules import RULES
from steplm.growth.grow import grow, provenance, renamed
from steplm.growth.operators import OPERATORS, require_row_wise
from steplm.models.build import DTYPES, fresh_layers, grown_config, initial_state
from steplm.models.folder import load_config_and_state
from steplm.optim.adamw import carry_state, inherited_state
from steplm.optim.build import reassign, rule_of_each
from steplm.optim.restart import kept_moments
from steplm.pet.adapters import merge_state
from steplm.pet.trainable import apply_trainable
from steplm.schedule import Phase, trained_patterns
from steplm.training.assemble import Assembled, PhaseStart, packed_rows, probe_model
from steplm.training.checks import phase_config
from steplm.training.context import RunContext
from steplm.training.evaluate import probe_loss
from steplm.training.peak_meter import peak_meter_for
from steplm.training.step import StageLog, StepOptions, forward_backward, step_options, trial
from steplm.types import LayerMap, LayerProvenance, MemoryEstimate, TrainState, to_json


def enter(run: RunContext, phase: Phase, before: Checkpoint | None) -> PhaseStart:
    """Initial weights, the weights of the checkpoint when resuming, or the merged and grown weights.

    Args:
        before: checkpoint to continue from, of this phase or the previous one; None at the start of a run.
    """
    reset_peak(run.device)
    if before is None:
        return _first_start(run, phase)
    state = before.state
    start = PhaseStart(
        hf_config=before.config,
        weights=before.weights,
        provenance=state.provenance,
        progress=state.progress,
        optimizer=before.optimizer,
        optimizer_steps=state.optimizer_steps,
    )
    if phase.stage == state.progress.stage_index:
        start.log = StageLog(list(state.unlogged_losses), list(state.unlogged_sources))
    if phase.index == state.progress.phase_index:
        start.adapters, start.trained_names = before.adapters, state.trained_names
        return start
    start.progress = next_phase(phase, state.progress)
    if phase.entry.kind != "go_on":
        _merge_and_grow(run, phase, before, start)
    return start


def go_on(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> None:
    """Continue with the assembled model, and change which parameters are trained.

    Raises:
        MemoryMismatch: the measured bytes of the model state differ from the plan.
    """
    model, shape = assembled.model, run.plan.shape
    assembled.rules.zero_grad()
    apply_trainable(model, trained_patterns(phase, shape))
    reassign(assembled.rules, run.config, model, phase, shape.layer_prefix)
    start.progress = next_phase(phase, start.progress)
    measured = _model_state(phase, assembled, expect_gradients=not run.config.memory.fused_backward)
    check_against_plan(measured, run.plan.cost(phase).memory)


def _model_state(phase: Phase, assembled: Assembled, *, expect_gradients: bool) -> MemoryEstimate:
    return measure_model_state(
        assembled.model,
        assembled.rules,
        phase.num_hidden_layers,
        host=assembled.rules.host,
        packed=packed_rows(assembled.model),
        expect_gradients=expect_gradients,
    )


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


def _merge_and_grow(run: RunContext, phase: Phase, before: Checkpoint, start: PhaseStart) -> None:
    """Merge adapters, then grow if the phase grows; log the loss before and after each."""
    state, entry, cut = before.state, phase.entry, run.world.rows.cut
    if state.phase.has_adapters:
        start.weights = merge_state(before.weights, before.adapters, state.phase, run.world.rows)
    start.probe_loss = loss_merged = probe_loss(run, probe_model(run.config, before.config, start.weights, run.world))
    run.metrics.write(
        "merge",
        stage=state.progress.stage_index,
        tokens_seen=state.progress.tokens_seen,
        loss_before=state.probe_loss,
        loss_after=loss_merged,
    )
    start.optimizer, start.optimizer_steps = _kept_optimizer(run, phase, before)
    if entry.layer_map is None or entry.operator is None:
        run.display.restart(phase, state.probe_loss, loss_merged)
        return
    if run.config.init_from is None:
        start.hf_config = phase_config(run.config, run.plan.schedule, phase)
    else:  # the layers are configured as in the given model
        start.hf_config = grown_config(before.config, entry.layer_map)
    fresh = fresh_layers(start.hf_config, seed=run.config.seed + phase.stage, dtype=DTYPES[run.config.train.precision])
    require_row_wise(entry.operator, run.world.rows)
    start.weights = grow(  # growing a rank's rows gives its rows of the grown model
        start.weights,
        entry.layer_map,
        entry.operator,
        fresh_layer=lambda index: {name: cut(tensor) for name, tensor in fresh(index).items()},
    )
    start.provenance = provenance(state.provenance, entry.layer_map, phase.stage, entry.operator)
    start.probe_loss = probe_loss(run, probe_model(run.config, start.hf_config, start.weights, run.world))
    run.metrics.write(
        "growth",
        stage=phase.stage,
        tokens_seen=state.progress.tokens_seen,
        loss_before=loss_merged,
        loss_after=start.probe_loss,
        operator=entry.operator,
        position=run.config.growth.resolved_position,
    )
    run.display.growth(phase, run.config.growth, state.probe_loss, loss_merged, start.probe_loss)


def _kept_optimizer(run: RunContext, phase: Phase, before: Checkpoint) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The optimizer states that the phase keeps: those of weights still trained by the same rule, and of adapters."""
    saved, steps, config = before.optimizer, before.state.optimizer_steps, run.config
    grows = phase.entry.kind == "grow"
    kept: dict[str, Tensor] = {}
    kept_steps: dict[str, int] = {}
    if config.optim.keep_state_at_growth or not grows:
        kept, kept_steps = carry_state(saved, steps, _under_the_same_rule(run, phase, before))
    if grows and config.growth.optimizer_states == "parents":
        of_new, of_new_steps = inherited_state(saved, steps, _parents_under_the_same_rule(run, phase, before))
        kept, kept_steps = kept | of_new, kept_steps | of_new_steps
    if not grows and config.pet.restart_keep:
        names = [name for name in steps if name in before.adapters]
        kept |= kept_moments(saved, names, config.pet.restart_keep)
        kept_steps |= {name: steps[name] for name in names}
    return kept, kept_steps


def _under_the_same_rule(run: RunContext, phase: Phase, before: Checkpoint) -> dict[str, str]:
    """Old and new name of the weights whose update rule stays the same, because states differ between rules."""
    names = renamed(before.weights, phase.entry.layer_map or LayerMap.identity(before.state.phase.num_hidden_layers))
    old = _rules(run, before.state.phase, {name: before.weights[name] for name in names})
    new = _rules(run, phase, {after: before.weights[name] for name, after in names.items()})
    return {name: after for name, after in names.items() if old[name] == new[after]}


def _parents_under_the_same_rule(
    run: RunContext, phase: Phase, before: Checkpoint
) -> dict[str, tuple[list[str], float]]:
    """For each new-layer weight with the same update rule as its parents: the parents' names and their mix fraction."""
    layer_map, operator = phase.entry.layer_map, phase.entry.operator
    assert layer_map is not None
    assert operator is not None
    if OPERATORS[operator].fresh:
        return {}
    prefix, rules_before = run.plan.shape.layer_prefix, _rules(run, before.state.phase, before.weights)
    found = {}
    for index in layer_map.new_layers:
        origin = layer_map.origins[index]
        mixes = operator == "interpolation_mean" and len(origin.parents) > 1
        parents = origin.parents if mixes else origin.parents[:1]
        own = f"{prefix}.{parents[0]}."
        for name, weight in before.weights.items():
            if not name.startswith(own):
                continue
            below, new = name.removeprefix(own), f"{prefix}.{index}.{name.removeprefix(own)}"
            of = [f"{prefix}.{parent}.{below}" for parent in parents]
            rule = _rules(run, phase, {new: weight})[new]
            if all(rules_before[parent] == rule for parent in of) and RULES[rule].inheritable:
                found[new] = of, origin.fraction if mixes else 0.0
    return found


def _rules(run: RunContext, phase: Phase, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The update rule that each of these weights would have in this phase."""
    shape = run.plan.shape
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return rule_of_each(shapes, phase, shape.layer_prefix, {linear.name for linear in shape.linears}, run.config)


def check_entrance(run: RunContext, phase: Phase, start: PhaseStart, assembled: Assembled) -> None:
    """Do a dry run without an update, then compare measured bytes with planned bytes.

    A resume in the middle of a phase is checked too, but its events are already in the log and not logged again.

    Raises:
        MemoryMismatch: measured and planned bytes differ.
    """
    train, cost = run.config.train, run.plan.cost(phase)
    entrance_peak = measure_peak(run.device)  # of merge, growth and assembly
    reset_peak(run.device)
    options = step_options(run.config, run.world)
    measured_peak, library_bytes = _dry_run(run, assembled, options) if train.dry_run else (None, 0)
    everything = _model_state(phase, assembled, expect_gradients=not (train.dry_run or options.fused_backward))
    assembled.rules.zero_grad()
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


def _dry_run(run: RunContext, assembled: Assembled, options: StepOptions) -> tuple[int | None, int]:
    """Run a step without its update; gradients are kept, except with ``fused_backward``.

    Returns:
        Peak bytes of tensors on the device (None if unknown), and bytes of library workspaces.
    """
    model, rules, train = assembled.model, assembled.rules, run.config.train
    # Two micro-batches if the step has that many: the second runs on top of the gradients of the first.
    num_sequences = run.config.micro_batch_size * min(2, run.config.micro_batches)
    batch = run.loader.batch(0, num_sequences)
    # The count does not see tensors inside compiled layers, or the buffers into which sharded layers gather weights.
    counts = run.device.type == "cuda" or (run.world.is_alone and not train.compile)
    with peak_meter_for(run.device) if counts else nullcontext() as meter:
        if meter is not None:
            meter.watch(model, rules)
            meter.start("dry run")
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
