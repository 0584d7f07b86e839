"""``RunConfig -> Plan``: layers, trained parameters, tokens and bytes of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from steplm.config import MemoryConfig, RunConfig
from steplm.errors import ConfigError, PlanInfeasible
from steplm.memory.estimate import adapter_matrices_per_layer, estimate_stage, resolve_target_modules
from steplm.memory.peak import estimate_peak
from steplm.planner.flops import training_flops_per_token
from steplm.planner.positions import make_layer_map
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.solve import SOLVERS, equal_parts_if_as_good, peak_cost
from steplm.planner.tokens import stage_tokens
from steplm.types import AdapterSpec, LayerMap, MemoryEstimate, ModelShape, PeakEstimate, Plan, Stage
from steplm.units import format_bytes


def plan(config: RunConfig, shape: ModelShape | None = None) -> Plan:
    """The stages of a run: layers, trained parameters, adapters, tokens and bytes of each.

    Args:
        config: the run.
        shape: of the full model; default: from ``config.model``. Needed for model types that
            ``steplm.planner.shape.FAMILIES`` does not know.

    Raises:
        ConfigError: values that make no model, no adapters or no step.
        PlanInfeasible: more stages than layers, or more bytes than ``plan.budget``.
    """
    shape = shape or shape_from_hf_config(config.model.hf_config())
    costs = StageCosts(config, shape)
    layers, proved_optimal = _choose_layers(config, shape, costs)
    depths = tuple(accumulate(layers))
    layer_maps = [costs.layer_map(new, depth - new) for new, depth in zip(layers, depths, strict=True)]
    tokens = stage_tokens(
        config.plan,
        layers,
        step_tokens=config.train.sequence_length
        * config.train.per_device_train_batch_size
        * config.train.gradient_accumulation_steps,
        num_parameters=shape.num_parameters(),
        flops_per_token=[costs.flops_per_token(new, depth - new) for new, depth in zip(layers, depths, strict=True)],
    )
    stages = []
    for i, layer_map in enumerate(layer_maps):
        adapters = costs.adapters(layer_map)
        num_old = depths[i] - layers[i]
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
                memory=costs.model_state(layers[i], num_old),
                peak=costs.peak(layers[i], num_old),
            )
        )
    vanilla = StageCosts(as_vanilla(config), shape)
    vanilla_peak = vanilla.peak(shape.num_hidden_layers, 0)
    made = Plan(
        shape=shape,
        precision=config.train.precision,
        stages=tuple(stages),
        proved_optimal=proved_optimal,
        vanilla_model_state_bytes=vanilla.model_state(shape.num_hidden_layers, 0).total_bytes,
        vanilla_peak_bytes=None if vanilla_peak is None else vanilla_peak.total_bytes,
    )
    if config.plan.budget is not None:
        check_budget(made, config.plan.budget, config)
    return made


def as_vanilla(config: RunConfig) -> RunConfig:
    """Ordinary mixed-precision training on the same batches: one stage, no memory option, no recomputation."""
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    one_stage = config.plan.model_copy(update={"num_stages": 1, "layers": None})
    return config.model_copy(update={"train": train, "plan": one_stage, "memory": MemoryConfig()})


def check_budget(plan: Plan, budget_bytes: int, config: RunConfig) -> None:
    """Refuse a plan that does not fit.

    Raises:
        PlanInfeasible: the largest stage and the reserve need more than the budget.
        ConfigError: the peak is not known.
    """
    memory = config.memory
    if plan.peak_bytes is None:
        raise ConfigError(
            f"plan.budget={format_bytes(budget_bytes)} cannot be checked: activations of model type "
            f"{plan.shape.model_type!r} are not known by formula. Leave plan.budget out, and count the peak with "
            "`steplm plan RUN --simulate`.",
            model_type=plan.shape.model_type,
            peak_model_state_bytes=plan.peak_model_state_bytes,
        )
    stage = max(plan.stages, key=lambda stage: stage.device_bytes)
    needed = memory.needed_bytes(stage.device_bytes)
    if needed <= budget_bytes:
        return
    at_peak = stage.memory if stage.peak is None else stage.peak.highest.memory
    kinds = ("weights", "gradients", "optimizer", "activations", "workspace")
    parts = ", ".join(
        f"{kind} {format_bytes(at_peak.bytes_of(kind=kind))}" for kind in kinds if at_peak.bytes_of(kind=kind)
    )
    is_least = plan.proved_optimal and config.plan.objective == "peak"
    fact = f"no {plan.num_stages}-stage plan fits" if is_least else f"layers {list(plan.layers)} do not fit"
    raise PlanInfeasible(
        f"{fact} plan.budget={format_bytes(budget_bytes)}: the {'smallest ' if is_least else ''}peak is "
        f"{format_bytes(stage.device_bytes)}, in stage {stage.index} ({parts}), and with memory.reserve="
        f"{format_bytes(memory.reserve)} it needs {format_bytes(needed)}. `steplm fit` lists what would fit.",
        budget_bytes=budget_bytes,
        reserve_bytes=memory.reserve,
        peak_bytes=stage.device_bytes,
        stage=stage.index,
    )


class StageCosts:
    """What a stage of ``num_new`` layers on ``num_old`` older ones holds and computes."""

    def __init__(self, config: RunConfig, shape: ModelShape) -> None:
        self.config, self.shape = config, shape
        grows = config.plan.num_stages > 1
        has_adapters = grows and config.plan.freeze_old_layers and config.pet.method != "none"
        self.device_bytes, self.objective_bytes = cache(self._device_bytes), cache(self._objective_bytes)
        self.adapter_matrices: tuple[int, ...] = ()
        self.targets: tuple[str, ...] = ()
        if has_adapters:
            self.targets = resolve_target_modules(shape, config.pet.target_modules)
            self.adapter_matrices = adapter_matrices_per_layer(shape, config.pet.rank, self.targets)

    def model_state(self, num_new: int, num_old: int, *, count_outer: bool | None = None) -> MemoryEstimate:
        """Bytes of weights, gradients, optimizer states and adapters."""
        frozen = num_old if self.config.plan.freeze_old_layers else 0
        return estimate_stage(
            self.shape,
            precision=self.config.train.precision,
            num_new_layers=num_new + num_old - frozen,
            num_frozen_layers=frozen,
            adapter_matrices=self.adapter_matrices,
            outer=self.outer(num_old),
            outer_rank=self.config.pet.rank,
            count_outer=self.config.plan.count_embeddings if count_outer is None else count_outer,
            memory=self.config.memory,
        )

    def peak(self, num_new: int, num_old: int) -> PeakEstimate | None:
        """All bytes on the device at the moments that can be the highest; None for families not modelled."""
        layer_map = self.layer_map(num_new, num_old)
        new_layers: Sequence[int] = range(num_new + num_old)
        if layer_map is not None and self.config.plan.freeze_old_layers:
            new_layers = layer_map.new_layers
        return estimate_peak(
            self.shape,
            self.model_state(num_new, num_old, count_outer=True),
            train=self.config.train,
            memory=self.config.memory,
            num_layers=num_new + num_old,
            new_layers=new_layers,
            adapter_rank=self.config.pet.rank if self.adapter_matrices else 0,
            adapter_targets=self.targets,
            outer=self.outer(num_old),
            eval_batch_size=self.config.eval.per_device_eval_batch_size,
            within_documents=self.config.data.within_documents,
            grows=num_old > 0,
        )

    def _objective_bytes(self, num_new: int, num_old: int) -> int:
        """What the division into stages keeps low."""
        if self.config.plan.objective == "peak":
            return self.device_bytes(num_new, num_old)
        return self.model_state(num_new, num_old).total_bytes

    def _device_bytes(self, num_new: int, num_old: int) -> int:
        """The highest moment, or the model state where that is all that is known."""
        peak = self.peak(num_new, num_old)
        return self.model_state(num_new, num_old).total_bytes if peak is None else peak.total_bytes

    def outer(self, num_old: int) -> str:
        """How embeddings, final norm and head are held: "trained", "frozen" or "adapters"."""
        choice = self.config.plan.train_embeddings
        return "trained" if num_old == 0 or choice == "always" else {"first_stage": "frozen"}.get(choice, choice)

    def layer_map(self, num_new: int, num_old: int) -> LayerMap | None:
        if num_old == 0:
            return None
        return make_layer_map(num_old, num_new, self.config.growth.resolved_position, self.config.seed)

    def adapters(self, layer_map: LayerMap | None) -> AdapterSpec | None:
        pet = self.config.pet
        if layer_map is None or not self.adapter_matrices:
            return None
        return AdapterSpec(
            method=pet.method,
            rank=pet.rank,
            alpha=float(pet.rank) if pet.alpha is None else pet.alpha,
            target_modules=self.targets,
            layers=layer_map.kept_layers,
            embeddings=self.config.plan.train_embeddings == "adapters",
        )

    def flops_per_token(self, num_new: int, num_old: int) -> int:
        layer_map = self.layer_map(num_new, num_old)
        frozen = num_old if self.config.plan.freeze_old_layers else 0
        outer = self.outer(num_old)
        no_backward = 0
        if layer_map is not None and frozen and outer == "frozen" and not self.adapter_matrices:
            no_backward = min(layer_map.new_layers)
        return training_flops_per_token(
            self.shape,
            sequence_length=self.config.train.sequence_length,
            num_new_layers=num_new + num_old - frozen,
            num_frozen_layers=frozen,
            adapter_parameters=sum(self.adapter_matrices),
            train_outer=outer == "trained",
            head_rank=self.config.pet.rank if outer == "adapters" else 0,
            num_layers_without_backward=no_backward,
        )


def _choose_layers(config: RunConfig, shape: ModelShape, costs: StageCosts) -> tuple[tuple[int, ...], bool]:
    """n_1 … n_K, and whether no other choice has a smaller peak."""
    num_layers, num_stages = shape.num_hidden_layers, config.plan.num_stages
    if config.plan.layers is not None and sum(config.plan.layers) != num_layers:
        raise ConfigError(
            f"plan.layers {config.plan.layers} adds up to {sum(config.plan.layers)}, "
            f"but the model has {num_layers} layers.",
            layers=config.plan.layers,
            num_hidden_layers=num_layers,
        )
    cost = costs.objective_bytes
    best = SOLVERS[config.plan.solver](cost, num_layers, num_stages)
    if config.plan.layers is not None:
        by_hand = tuple(config.plan.layers)
        return by_hand, peak_cost(cost, by_hand) == peak_cost(cost, best)
    return (best if config.plan.freeze_old_layers else equal_parts_if_as_good(cost, best)), True


def _trained_patterns(
    config: RunConfig, shape: ModelShape, layer_map: LayerMap | None, adapters: AdapterSpec | None
) -> tuple[str, ...]:
    """Shell-style patterns over full names; the dot of ``model.layers.1.*`` keeps layer 11 out."""
    if layer_map is None:
        return ("*",)
    choice = config.plan.train_embeddings
    if not config.plan.freeze_old_layers and choice == "always":
        return ("*",)
    layers = layer_map.new_layers if config.plan.freeze_old_layers else range(layer_map.num_layers)
    outer = {
        "always": shape.outer_patterns,
        "adapters": tuple(f"{name}.*" for name in shape.final_norm_modules),
        "first_stage": (),
    }[choice]
    return (
        *(f"{shape.layer_prefix}.{layer}.*" for layer in layers),
        *(("*.lora_A", "*.lora_B") if adapters is not None else ()),
        *outer,
    )
