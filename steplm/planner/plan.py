"""``RunConfig -> Plan``: layers, trained parameters, tokens and bytes of every stage."""

from __future__ import annotations

from itertools import accumulate

from steplm.config import RunConfig
from steplm.errors import ConfigError, PlanInfeasible
from steplm.memory.estimate import adapter_parameters_per_layer, estimate_stage, resolve_target_modules
from steplm.planner.flops import training_flops_per_token
from steplm.planner.positions import make_layer_map
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.solve import (
    LinearStageCost,
    peak_cost,
    solve_dynamic_programming,
    solve_integer_programme,
)
from steplm.planner.tokens import stage_tokens
from steplm.types import AdapterSpec, LayerMap, MemoryEstimate, ModelShape, Plan, Stage
from steplm.units import format_bytes


def plan(config: RunConfig, shape: ModelShape | None = None) -> Plan:
    """The stages of a run: layers, trained parameters, adapters, tokens and model-state bytes of each.

    Args:
        config: the run.
        shape: of the full model; default: from ``config.model``. Needed for model types that
            ``steplm.planner.shape.FAMILIES`` does not know.

    Raises:
        ConfigError: values that make no model, no adapters or no step.
        PlanInfeasible: more stages than layers, or more model-state bytes than ``plan.budget``.
    """
    shape = shape or shape_from_hf_config(config.model.hf_config())
    adapter_parameters = 0
    if config.plan.num_stages > 1 and config.plan.freeze_old_layers and config.pet.method != "none":
        adapter_parameters = adapter_parameters_per_layer(shape, config.pet.rank, config.pet.target_modules)
    layers, proved_optimal = _choose_layers(config, shape, adapter_parameters)
    depths = tuple(accumulate(layers))
    layer_maps = [
        None,  # stage 1 grows nothing
        *(
            make_layer_map(old, new, config.growth.resolved_position, config.seed)
            for old, new in zip(depths, layers[1:], strict=False)
        ),
    ]
    tokens = stage_tokens(
        config.plan,
        layers,
        step_tokens=config.train.sequence_length
        * config.train.per_device_train_batch_size
        * config.train.gradient_accumulation_steps,
        num_parameters=shape.num_parameters(),
        flops_per_token=[
            _flops_per_token(config, shape, adapter_parameters, depth, layer_map)
            for depth, layer_map in zip(depths, layer_maps, strict=True)
        ],
    )
    stages = []
    for i, layer_map in enumerate(layer_maps):
        adapters = _adapters(config, shape, layer_map) if layer_map is not None and adapter_parameters else None
        stages.append(
            Stage(
                index=i + 1,
                num_new_layers=layers[i],
                num_hidden_layers=depths[i],
                layer_map=layer_map,
                trained_patterns=_trained_patterns(config, shape, layer_map, adapters),
                adapters=adapters,
                scheduled_tokens=tokens[i].scheduled,
                tokens=tokens[i].trained,
                memory=_stage_memory(config, shape, adapter_parameters, layers[i], depths[i] - layers[i]),
            )
        )
    vanilla = _stage_memory(config, shape, adapter_parameters, shape.num_hidden_layers, 0)
    made = Plan(
        shape=shape,
        precision=config.train.precision,
        stages=tuple(stages),
        proved_optimal=proved_optimal,
        vanilla_model_state_bytes=vanilla.total_bytes,
    )
    if config.plan.budget is not None:
        _check_budget(made, config.plan.budget)
    return made


def _check_budget(plan: Plan, budget_bytes: int) -> None:
    peak_bytes = plan.peak_model_state_bytes
    if peak_bytes <= budget_bytes:
        return
    peak = next(stage for stage in plan.stages if stage.memory.total_bytes == peak_bytes)
    kinds = ("weights", "gradients", "optimizer")
    parts = ", ".join(f"{kind} {format_bytes(peak.memory.bytes_of(kind=kind))}" for kind in kinds)
    fact = f"no {plan.num_stages}-stage plan fits" if plan.proved_optimal else f"layers {list(plan.layers)} do not fit"
    raise PlanInfeasible(
        f"{fact} plan.budget={format_bytes(budget_bytes)}: the {'smallest ' if plan.proved_optimal else ''}peak of the "
        f"model states is {format_bytes(peak_bytes)}, in stage {peak.index} ({parts}). "
        "Raise plan.budget or plan.num_stages, or lower pet.rank or the size of the model.",
        budget_bytes=budget_bytes,
        peak_bytes=peak_bytes,
        stage=peak.index,
    )


def _choose_layers(config: RunConfig, shape: ModelShape, adapter_parameters: int) -> tuple[tuple[int, ...], bool]:
    """n_1 … n_K, and whether no other choice has a smaller peak."""
    num_layers, num_stages = shape.num_hidden_layers, config.plan.num_stages
    if config.plan.layers is not None and sum(config.plan.layers) != num_layers:
        raise ConfigError(
            f"plan.layers {config.plan.layers} adds up to {sum(config.plan.layers)}, "
            f"but the model has {num_layers} layers.",
            layers=config.plan.layers,
            num_hidden_layers=num_layers,
        )
    cost = _linear_cost(config, shape, adapter_parameters)
    if config.plan.solver == "integer_programme":
        best = solve_integer_programme(cost, num_layers, num_stages)
    else:
        best = solve_dynamic_programming(cost, num_layers, num_stages)
    if config.plan.layers is not None:
        by_hand = tuple(config.plan.layers)
        return by_hand, peak_cost(cost, by_hand) == peak_cost(cost, best)
    # Without freezing, the last stage trains the whole model: as a rule every division has the same
    # peak, and equal parts are the natural one.
    smaller, remainder = divmod(num_layers, num_stages)
    equal_parts = tuple(smaller + (stage < remainder) for stage in range(num_stages))
    if not config.plan.freeze_old_layers and peak_cost(cost, equal_parts) == peak_cost(cost, best):
        return equal_parts, True
    return best, True


def _linear_cost(config: RunConfig, shape: ModelShape, adapter_parameters: int) -> LinearStageCost:
    """Bytes of a stage as the solvers want them, read off the estimate itself."""

    def total_bytes(num_new: int, num_old: int) -> int:
        return _stage_memory(config, shape, adapter_parameters, num_new, num_old).total_bytes

    new_layer = total_bytes(2, 0) - total_bytes(1, 0)
    old_layer = total_bytes(1, 2) - total_bytes(1, 1)
    return LinearStageCost(
        new_layer=new_layer,
        old_layer=old_layer,
        first_stage=total_bytes(1, 0) - new_layer,
        later_stage=total_bytes(1, 1) - new_layer - old_layer,
    )


def _stage_memory(
    config: RunConfig, shape: ModelShape, adapter_parameters: int, num_new: int, num_old: int
) -> MemoryEstimate:
    frozen = num_old if config.plan.freeze_old_layers else 0
    return estimate_stage(
        shape,
        precision=config.train.precision,
        num_new_layers=num_new + num_old - frozen,
        num_frozen_layers=frozen,
        adapter_parameters=adapter_parameters,
        train_outer=_trains_outer(config, is_first_stage=num_old == 0),
        count_outer=config.plan.count_embeddings,
    )


def _trains_outer(config: RunConfig, *, is_first_stage: bool) -> bool:
    """Whether embeddings, final norm and head are trained."""
    return is_first_stage or config.plan.train_embeddings == "always"


def _adapters(config: RunConfig, shape: ModelShape, layer_map: LayerMap) -> AdapterSpec:
    return AdapterSpec(
        method=config.pet.method,
        rank=config.pet.rank,
        alpha=float(config.pet.rank) if config.pet.alpha is None else config.pet.alpha,
        target_modules=resolve_target_modules(shape, config.pet.target_modules),
        layers=layer_map.kept_layers,
    )


def _trained_patterns(
    config: RunConfig, shape: ModelShape, layer_map: LayerMap | None, adapters: AdapterSpec | None
) -> tuple[str, ...]:
    """Shell-style patterns over full names; the dot of ``model.layers.1.*`` keeps layer 11 out."""
    if layer_map is None:
        return ("*",)
    trains_outer = _trains_outer(config, is_first_stage=False)
    if not config.plan.freeze_old_layers and trains_outer:
        return ("*",)
    layers = layer_map.new_layers if config.plan.freeze_old_layers else range(layer_map.num_layers)
    return (
        *(f"{shape.layer_prefix}.{layer}.*" for layer in layers),
        *(("*.lora_A", "*.lora_B") if adapters is not None else ()),
        *(shape.outer_patterns if trains_outer else ()),
    )


def _flops_per_token(
    config: RunConfig, shape: ModelShape, adapter_parameters: int, depth: int, layer_map: LayerMap | None
) -> int:
    frozen = len(layer_map.kept_layers) if layer_map is not None and config.plan.freeze_old_layers else 0
    trains_outer = _trains_outer(config, is_first_stage=layer_map is None)
    no_backward = 0
    if layer_map is not None and frozen and not trains_outer and not adapter_parameters:
        no_backward = min(layer_map.new_layers)
    return training_flops_per_token(
        shape,
        sequence_length=config.train.sequence_length,
        num_new_layers=depth - frozen,
        num_frozen_layers=frozen,
        adapter_parameters=adapter_parameters,
        train_outer=trains_outer,
        num_layers_without_backward=no_backward,
    )
