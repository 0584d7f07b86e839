"""``RunConfig -> Plan``: layers, trained parameters, tokens and bytes of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

from steplm.config import MemoryConfig, RunConfig
from steplm.errors import ConfigError, PlanInfeasible
from steplm.memory.activations import Workload, is_modelled
from steplm.memory.estimate import adapter_shapes_per_layer, estimate_stage, resolve_target_modules
from steplm.memory.moments import Moments, Pass
from steplm.memory.sharded import Groups, ShardedMoments
from steplm.memory.terms import low_rank_maps
from steplm.planner.flops import training_flops_per_token
from steplm.planner.positions import make_layer_map
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.solve import SOLVERS, equal_parts_if_as_good, peak_cost
from steplm.planner.tokens import divide, stage_tokens
from steplm.types import AdapterSpec, LayerMap, MemoryEstimate, ModelShape, PeakEstimate, Plan, Stage, TensorShape
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
    tokens = stage_tokens(
        config.plan,
        layers,
        step_tokens=config.step_tokens,
        num_parameters=shape.num_parameters(),
        flops_per_token=[costs.mean_flops_per_token(n, depth - n) for n, depth in zip(layers, depths, strict=True)],
    )
    run_tokens = sum(of_stage.trained for of_stage in tokens)
    stages: list[Stage] = []
    for growth, (num_new, depth, of_stage) in enumerate(zip(layers, depths, tokens, strict=True)):
        grown_at = sum(stage.tokens for stage in stages)
        for part in costs.parts(num_new, depth - num_new, of_stage.trained // config.step_tokens):
            seen = sum(stage.tokens for stage in stages)
            over_run = config.optim.schedule_over == "run"
            stages.append(
                Stage(
                    index=len(stages) + 1,
                    num_new_layers=0 if part.is_restart else num_new,
                    num_hidden_layers=depth,
                    layer_map=part.layer_map,
                    frozen_layers=part.frozen_layers,
                    trained_patterns=_trained_patterns(config, shape, part),
                    adapters=costs.adapters(part),
                    scheduled_tokens=run_tokens if over_run else of_stage.scheduled,
                    tokens=part.num_steps * config.step_tokens,
                    memory=costs.model_state(part.phase),
                    peak=costs.peak(part.phase, grows=part.layer_map is not None),
                    flops_per_token=costs.flops_per_token(part.phase),
                    num_growths=growth,
                    schedule_start_tokens=seen if over_run else seen - grown_at,
                    low_rank_layers=costs.low_rank_layers(part.phase),
                )
            )
    vanilla = StageCosts(as_vanilla(config), shape)
    whole = Phase(shape.num_hidden_layers, 0)
    vanilla_peak = vanilla.peak(whole)
    made = Plan(
        shape=shape,
        precision=config.train.precision,
        stages=tuple(stages),
        proved_optimal=proved_optimal,
        vanilla_model_state_bytes=vanilla.model_state(whole).total_bytes,
        vanilla_peak_bytes=None if vanilla_peak is None else vanilla_peak.total_bytes,
    )
    if config.plan.budget is not None:
        check_budget(made, config.plan.budget, config)
    return made


def as_vanilla(config: RunConfig) -> RunConfig:
    """Ordinary mixed-precision training on the same batches: AdamW, one stage, no adapters, no memory option."""
    changes = {
        "train": config.train.model_copy(update={"gradient_checkpointing": False}),
        "plan": config.plan.model_copy(update={"num_stages": 1, "layers": None}),
        "pet": config.pet.model_copy(update={"layers": "old", "warm_start": 0.0, "restarts": 0}),
        "optim": config.optim.model_copy(update={"name": "adamw", "low_rank_layers": "all"}),
        "memory": MemoryConfig(),
    }
    return config.model_copy(update=changes)


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
    assert stage.peak is not None  # or the plan's were not known
    at_peak = stage.peak.highest.memory
    kinds = ("weights", "gradients", "optimizer", "activations", "workspace")
    parts = ", ".join(
        f"{kind} {format_bytes(at_peak.bytes_of(kind=kind))}" for kind in kinds if at_peak.bytes_of(kind=kind)
    )
    is_least = plan.proved_optimal and config.plan.objective == "peak"
    fact = f"no {config.plan.num_stages}-stage plan fits" if is_least else f"layers {list(plan.layers)} do not fit"
    raise PlanInfeasible(
        f"{fact} plan.budget={format_bytes(budget_bytes)}: the {'smallest ' if is_least else ''}peak is "
        f"{format_bytes(stage.device_bytes)}, in stage {stage.index} ({parts}), and with memory.reserve="
        f"{format_bytes(memory.reserve)} it needs {format_bytes(needed)}. `steplm fit` lists what would fit.",
        budget_bytes=budget_bytes,
        reserve_bytes=memory.reserve,
        peak_bytes=stage.device_bytes,
        stage=stage.index,
    )


# Of 1, 2, 4, 8 and 16 the best lie here, and it costs no byte: docs/results.md.
ALPHA_OF_RANK = 4.0


class Phase(NamedTuple):
    """Which layers of a stage are trained in the manner of new ones, and which in that of old ones, at one time.

    A stage of STEP has one phase, its new layers and its old ones. Where adapters are on all layers, every layer
    counts as old, but for a warm start, in which every layer counts as new.
    """

    num_new: int
    num_old: int

    @property
    def depth(self) -> int:
        return self.num_new + self.num_old


@dataclass(frozen=True)
class Part:
    """A stretch of a stage with one set of trained parameters and one set of adapters."""

    phase: Phase
    layer_map: LayerMap | None
    frozen_layers: tuple[int, ...]
    num_steps: int
    is_restart: bool = False  # it goes on with the layers of the part before


class StageCosts:
    """What a stage of ``num_new`` layers on ``num_old`` older ones holds and computes, as a whole or in a phase."""

    def __init__(self, config: RunConfig, shape: ModelShape) -> None:
        self.config, self.shape = config, shape
        self.freezes_all = config.pet.layers == "all"
        self.device_bytes, self.objective_bytes = cache(self._device_bytes), cache(self._objective_bytes)
        self.adapter_shapes: tuple[TensorShape, ...] = ()
        self.targets: tuple[str, ...] = ()
        if config.has_adapters:
            self.targets = resolve_target_modules(shape, config.pet.target_modules)
            self.adapter_shapes = adapter_shapes_per_layer(shape, config.pet.rank, self.targets)

    @property
    def spares_old_layers(self) -> bool:
        """Whether a layer takes less memory when it is old."""
        low_rank = bool(low_rank_maps(self.shape, self.config.optim)) and self.config.optim.low_rank_layers == "old"
        return self.config.plan.freeze_old_layers or low_rank

    @property
    def adapter_parameters(self) -> int:
        """E: of one frozen layer."""
        return sum(prod(shape) for shape in self.adapter_shapes)

    def parts(self, num_new: int, num_old: int, num_steps: int) -> list[Part]:
        """The stretches of a stage: one, and one more for each restart of its adapters and for a warm start.

        Raises:
            ConfigError: a restart without a step.
        """
        pet, depth = self.config.pet, num_new + num_old
        phases = self.phases(num_new, num_old)
        warm = [round(pet.warm_start * num_steps)] if len(phases) > 1 else []
        num_rounds = pet.restarts + 1 if self.has_adapters(phases[-1]) else 1
        steps = [*warm, *divide(num_steps - sum(warm), [1 / num_rounds] * num_rounds)]
        if min(steps) < 1:
            raise ConfigError(
                f"{num_steps} steps are too few for pet.restarts={pet.restarts} and pet.warm_start={pet.warm_start:g}: "
                "each part needs a step. Lower them, or give the run more tokens.",
                num_steps=num_steps,
            )
        parts = []
        for index, steps_of_part in enumerate(steps):
            phase = phases[min(index, len(phases) - 1)]
            layer_map = self.layer_map(num_new, num_old) if index == 0 else LayerMap.identity(depth)
            frozen = self._frozen_layers(phase)
            parts.append(Part(phase, layer_map, frozen, steps_of_part, is_restart=index > 0))
        return parts

    def phases(self, num_new: int, num_old: int) -> list[Phase]:
        """Of a stage, one after the other."""
        if not self.freezes_all:
            return [Phase(num_new, num_old)]
        depth = num_new + num_old
        return [Phase(depth, 0), Phase(0, depth)] if self.config.pet.warm_start else [Phase(0, depth)]

    def has_adapters(self, phase: Phase) -> bool:
        return bool(self.adapter_shapes) and phase.num_old > 0

    def mean_flops_per_token(self, num_new: int, num_old: int, *, recomputed: bool = False) -> int:
        """Training FLOPs per token over the phases of a stage, those of recomputed activations too if asked."""
        *warm, last = [
            self.flops_per_token(phase) + recomputed * self.recomputed_flops_per_token(phase)
            for phase in self.phases(num_new, num_old)
        ]
        share = self.config.pet.warm_start if warm else 0.0
        return round((1 - share) * last + share * sum(warm))

    def model_state_bytes(self, num_new: int, num_old: int) -> int:
        """The most that any phase of a stage has."""
        return max(self.model_state(phase).total_bytes for phase in self.phases(num_new, num_old))

    def model_state(self, phase: Phase, *, count_outer: bool | None = None) -> MemoryEstimate:
        """Bytes of weights, gradients, optimizer states and adapters."""
        whole, frozen = self._whole_and_frozen(phase)
        num_low_rank = len(self.low_rank_layers(phase))
        return estimate_stage(
            self.shape,
            precision=self.config.train.precision,
            num_new_layers=whole - num_low_rank,
            num_frozen_layers=frozen,
            num_low_rank_layers=num_low_rank,
            adapter_shapes=self.adapter_shapes,
            outer=self.outer(phase),
            outer_rank=self.config.pet.rank,
            count_outer=self.config.plan.count_embeddings if count_outer is None else count_outer,
            memory=self.config.memory,
            optim=self.config.optim,
            num_shards=self.config.distributed.num_shards,
        )

    def peak(self, phase: Phase, *, grows: bool | None = None) -> PeakEstimate | None:
        """All bytes on the device at the moments that can be the highest; None for families not modelled.

        ``grows``: whether the weights of an older model are tried first; default: where there are older layers.
        """
        grows = phase.num_old > 0 if grows is None else grows
        whole = set(range(phase.depth)) - set(self._frozen_layers(phase))
        if self.config.optim.name != "badam":
            return self._peak(phase, tuple(sorted(whole)), grows)
        peaks = [self._peak(phase, (layer,), grows) for layer in sorted(whole)]  # each in its turn
        return max((peak for peak in peaks if peak), key=lambda peak: peak.total_bytes, default=None)

    def _peak(self, phase: Phase, whole_layers: tuple[int, ...], grows: bool) -> PeakEstimate | None:
        """Where these layers are trained as a whole."""
        if not is_modelled(self.shape):
            return None
        config, has_adapters = self.config, self.has_adapters(phase)
        work = Workload(
            self.shape,
            config.train.precision,
            config.micro_batch_size,
            config.train.sequence_length,
            config.pet.rank if has_adapters else 0,
            self.targets if has_adapters else (),
            config.data.within_documents,
        )
        of = Pass(
            work,
            self.model_state(phase, count_outer=True),
            config.train,
            config.memory,
            config.optim,
            phase.depth,
            frozenset(whole_layers),
            frozenset(self.low_rank_layers(phase)),
            self.outer(phase),
            config.micro_batches,
            config.eval_batch_size,
        )
        if config.distributed.world_size == 1:
            return PeakEstimate(Moments(of).in_order(grows=grows))
        groups = Groups.of(
            self.shape,
            config.distributed,
            work.width,
            adapter_shapes=self.adapter_shapes if has_adapters else (),
            outer=of.outer,
            outer_rank=work.adapter_rank,
            packs_frozen=config.memory.packs_frozen,
        )
        return PeakEstimate(ShardedMoments(of, groups).in_order(grows=grows))

    def _objective_bytes(self, num_new: int, num_old: int) -> int:
        """What the division into stages keeps low."""
        if self.config.plan.objective == "peak":
            return self.device_bytes(num_new, num_old)
        return self.model_state_bytes(num_new, num_old)

    def _device_bytes(self, num_new: int, num_old: int) -> int:
        """The highest moment, or the model state where that is all that is known."""
        peaks = [self.peak(phase) for phase in self.phases(num_new, num_old)]
        known = [peak.total_bytes for peak in peaks if peak is not None]
        return max(known) if known else self.model_state_bytes(num_new, num_old)

    def outer(self, phase: Phase) -> str:
        """How embeddings, final norm and head are held: "trained", "frozen" or "adapters"."""
        choice = self.config.plan.train_embeddings
        return "trained" if phase.num_old == 0 or choice == "always" else {"first_stage": "frozen"}.get(choice, choice)

    def layer_map(self, num_new: int, num_old: int) -> LayerMap | None:
        if num_old == 0 or num_new == 0:
            return None
        return make_layer_map(num_old, num_new, self.config.growth.resolved_position, self.config.seed)

    def adapters(self, part: Part) -> AdapterSpec | None:
        pet = self.config.pet
        if not self.has_adapters(part.phase):
            return None
        return AdapterSpec(
            method=pet.method,
            rank=pet.rank,
            alpha=ALPHA_OF_RANK * pet.rank if pet.alpha is None else pet.alpha,
            target_modules=self.targets,
            layers=part.frozen_layers,
            embeddings=self.config.plan.train_embeddings == "adapters",
        )

    def flops_per_token(self, phase: Phase) -> int:
        whole, frozen = self._whole_and_frozen(phase)
        outer = self.outer(phase)
        no_backward = 0
        if frozen and outer == "frozen" and not self.adapter_shapes:
            no_backward = min(set(range(phase.depth)) - set(self._frozen_layers(phase)))
        return training_flops_per_token(
            self.shape,
            sequence_length=self.config.train.sequence_length,
            num_new_layers=whole,
            num_frozen_layers=frozen,
            adapter_parameters=self.adapter_parameters,
            train_outer=outer == "trained",
            head_rank=self.config.pet.rank if outer == "adapters" else 0,
            num_layers_without_backward=no_backward,
        )

    def recomputed_flops_per_token(self, phase: Phase) -> int:
        """Of the second forward pass of the layers that ``train.gradient_checkpointing`` names."""
        whole, frozen = self._whole_and_frozen(phase)
        choice = self.config.train.gradient_checkpointing
        layers = whole * (choice in (True, "new")) + frozen * (choice in (True, "frozen"))
        matrices = sum(linear.in_features * linear.out_features for linear in self.shape.linears)
        attention = 4 * self.config.train.sequence_length * (self.shape.attention_size or self.shape.hidden_size)
        adapters = 2 * frozen * self.adapter_parameters * (choice in (True, "frozen"))
        return layers * (2 * matrices + attention) + adapters

    def _whole_and_frozen(self, phase: Phase) -> tuple[int, int]:
        """Layers trained as a whole at any one time, and the others."""
        if self.config.optim.name == "badam":
            return 1, phase.depth - 1
        return phase if self.config.plan.freeze_old_layers or self.freezes_all else (phase.depth, 0)

    def _frozen_layers(self, phase: Phase) -> tuple[int, ...]:
        """Indices of the layers that are not trained as a whole."""
        if self.freezes_all and phase.num_new == 0:
            return tuple(range(phase.num_old))
        return self._old_layers(phase) if self.config.plan.freeze_old_layers else ()

    def low_rank_layers(self, phase: Phase) -> tuple[int, ...]:
        """Indices of the layers that are trained as a whole and whose matrices have low-rank states."""
        if not low_rank_maps(self.shape, self.config.optim):
            return ()
        if self.config.optim.low_rank_layers == "old":
            return self._old_layers(phase)
        frozen = self._frozen_layers(phase)
        return tuple(layer for layer in range(phase.depth) if layer not in frozen)

    def _old_layers(self, phase: Phase) -> tuple[int, ...]:
        """Indices of the layers that were there before the growth."""
        layer_map = self.layer_map(*phase)
        return () if layer_map is None else layer_map.kept_layers


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
    return (best if costs.spares_old_layers else equal_parts_if_as_good(cost, best)), True


def _trained_patterns(config: RunConfig, shape: ModelShape, part: Part) -> tuple[str, ...]:
    """Shell-style patterns over full names; the dot of ``model.layers.1.*`` keeps layer 11 out."""
    choice = config.plan.train_embeddings if part.phase.num_old else "always"
    if not part.frozen_layers and choice == "always":
        return ("*",)
    outer = {
        "always": shape.outer_patterns,
        "adapters": tuple(f"{name}.*" for name in shape.final_norm_modules),
        "first_stage": (),
    }[choice]
    return (
        *(f"{shape.layer_prefix}.{layer}.*" for layer in range(part.phase.depth) if layer not in part.frozen_layers),
        *(("*.lora_A", "*.lora_B") if part.frozen_layers and config.pet.method != "none" else ()),
        *outer,
    )
