"""``RunConfig -> Plan``: the schedule of a run, and the cost of each of its phases."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from steplm.config import MemoryConfig, RunConfig
from steplm.cost.price import Cost
from steplm.cost.rules import RULES
from steplm.cost.transfers import Transfers
from steplm.errors import ConfigError, OverBudget, PlanInfeasible
from steplm.planner.methods import METHOD_KEYS, value_and_default
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.solve import SOLVERS, new_and_old, peak_cost
from steplm.planner.stages import StagePrices
from steplm.schedule import Phase, Schedule
from steplm.types import HOST, HOST_OPTIMIZER, HOST_WEIGHTS, MemoryEstimate, MemoryTerm, ModelShape, PeakEstimate
from steplm.units import format_bytes

SCHEMA_VERSION = 3  # of ``plan.json``


@dataclass(frozen=True)
class Stage:
    """The phases from one growth to the next, and their costs, as a view of a ``Plan``."""

    phases: tuple[Phase, ...]
    costs: tuple[Cost, ...]  # of each phase

    @property
    def index(self) -> int:
        """The number of the stage, from 1."""
        return self.phases[0].stage

    @property
    def grows(self) -> bool:
        """Whether the stage starts by adding layers to an existing model."""
        return self.phases[0].entry.kind == "grow"

    @property
    def num_hidden_layers(self) -> int:
        """The depth after growth."""
        return self.phases[0].num_hidden_layers

    @property
    def num_new_layers(self) -> int:
        return len(self.phases[0].new_layers) if self.grows else self.num_hidden_layers

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    @property
    def scheduled_tokens(self) -> int:
        return self.phases[0].scheduled_tokens

    @cached_property
    def memory(self) -> MemoryEstimate:
        """The largest model state of any phase."""
        return max((cost.memory for cost in self.costs), key=lambda memory: memory.total_bytes)

    @cached_property
    def peak(self) -> PeakEstimate | None:
        """The highest peak of device memory in any phase; None for families without activation formulas."""
        peaks = [cost.peak for cost in self.costs if cost.peak is not None]
        return max(peaks, key=lambda peak: peak.total_bytes, default=None)

    @cached_property
    def spans(self) -> tuple[Stage, ...]:
        """The phases grouped by memory use; tables show one row per group."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, cost in enumerate(self.costs):
            alike[cost.memory.total_bytes, cost.device_bytes].append(index)
        return tuple(
            Stage(tuple(self.phases[i] for i in indices), tuple(self.costs[i] for i in indices))
            for indices in alike.values()
        )

    @property
    def device_bytes(self) -> int:
        """The peak, or the model state for families without activation formulas."""
        return max(cost.device_bytes for cost in self.costs)

    @property
    def host_bytes(self) -> int:
        """Peak host memory."""
        return max(cost.host_bytes for cost in self.costs)

    @property
    def transfers(self) -> Transfers:
        """Transfers per step of the phase that moves the most to the host."""
        return max((cost.transfers for cost in self.costs), key=lambda moved: moved.to_host)

    @property
    def highest_phase(self) -> Phase:
        """The phase that needs the most device memory."""
        return max(zip(self.phases, self.costs, strict=True), key=lambda pair: pair[1].device_bytes)[0]

    @cached_property
    def training_flops(self) -> int:
        """Training FLOPs, excluding recomputed activations."""
        return sum(phase.tokens * cost.flops_per_token for phase, cost in zip(self.phases, self.costs, strict=True))

    @property
    def flops_per_token(self) -> int:
        """Mean training FLOPs per token."""
        return round(self.training_flops / self.tokens)


@dataclass(frozen=True)
class Plan:
    """The schedule that training follows, and its costs, which are computed from the schedule and the hardware."""

    shape: ModelShape
    precision: str  # "bf16" or "fp32"
    schedule: Schedule
    costs: tuple[Cost, ...]  # without duplicates
    cost_indices: tuple[int, ...]  # for each phase, the index of its cost in ``costs``
    proved_optimal: bool
    vanilla_model_state_bytes: int
    vanilla_peak_bytes: int | None = None  # with the same batches and no memory options
    schema_version: int = SCHEMA_VERSION

    def cost(self, phase: Phase) -> Cost:
        return self.costs[self.cost_indices[phase.index - 1]]

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(phases, tuple(map(self.cost, phases))) for phases in self.schedule.stages)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def layers(self) -> tuple[int, ...]:
        """n_1 … n_K, the layers that each stage adds."""
        return self.schedule.layers

    @property
    def total_tokens(self) -> int:
        return self.schedule.total_tokens

    @property
    def training_flops(self) -> int:
        """Training FLOPs of all stages, excluding evaluation and recomputed activations."""
        return sum(stage.training_flops for stage in self.stages)

    @property
    def peak_model_state_bytes(self) -> int:
        return max(cost.memory.total_bytes for cost in self.costs)

    @property
    def peak_bytes(self) -> int | None:
        """The highest peak of device memory in any phase; None for families without activation formulas."""
        peaks = [cost.peak.total_bytes for cost in self.costs if cost.peak is not None]
        return max(peaks) if len(peaks) == len(self.costs) else None

    @property
    def host_bytes(self) -> int:
        """Peak host memory of any phase."""
        return max(cost.host_bytes for cost in self.costs)

    @property
    def reduction(self) -> float:
        """Fraction of vanilla's model-state bytes that this plan saves, 0 … 1."""
        return 1.0 - self.peak_model_state_bytes / self.vanilla_model_state_bytes


def plan(config: RunConfig, shape: ModelShape | None = None) -> Plan:
    """Compute the schedule of a run and its cost.

    Args:
        config: the run.
        shape: the shape of the full model; default: from ``config.model``. Required for model types that are not in
            ``steplm.planner.shape.FAMILIES``.

    Raises:
        ConfigError: values that give no valid model, adapter or optimizer step, or that are incompatible.
        PlanInfeasible: more stages than layers, or more bytes than ``plan.budget`` or ``plan.host_budget``.
    """
    prices = StagePrices(config, shape or shape_from_hf_config(config.model.hf_config()))
    layers, proved_optimal = _choose_layers(prices)
    return _priced(_make_schedule(prices, layers), prices, proved_optimal=proved_optimal)


def price_again(config: RunConfig, shape: ModelShape, made: Plan) -> Plan:
    """Recompute the costs of a started run's schedule with the current batch size, devices and formulas.

    Raises:
        PlanInfeasible: more bytes than ``plan.budget`` or ``plan.host_budget``.
    """
    return _priced(made.schedule, StagePrices(config, shape), proved_optimal=made.proved_optimal)


def as_vanilla(config: RunConfig) -> RunConfig:
    """The same run as ordinary mixed-precision training on the same batches: AdamW, one stage, no memory options."""
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for key in METHOD_KEYS:
        section, _, name = key.partition(".")
        changes[section][name] = value_and_default(config, key)[1]
    changes["plan"] |= {"num_stages": 1, "layers": None, "budget": None, "host_budget": None}
    changes["optim"]["name"] = "adamw"
    changes["train"]["gradient_checkpointing"] = False
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return config.model_copy(update={"method": "vanilla", "memory": MemoryConfig(), **sections})


def _check_budget(plan: Plan, budget_bytes: int, config: RunConfig) -> None:
    """Check that a plan fits in device memory.

    Raises:
        OverBudget: the largest stage and the reserve need more than the budget.
        PlanInfeasible: the reserve alone does.
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
    budget, reserve = format_bytes(budget_bytes), format_bytes(memory.reserve)
    details = {
        "budget_bytes": budget_bytes,
        "reserve_bytes": memory.reserve,
        "peak_bytes": stage.device_bytes,
        "stage": stage.index,
    }
    if memory.reserve >= budget_bytes:
        raise PlanInfeasible(
            f"plan.budget={budget} leaves nothing for the model, as memory.reserve={reserve} is part of it: raise the "
            "budget, or lower memory.reserve.",
            **details,
        )
    assert stage.peak is not None  # otherwise the plan's peak would be None
    at_peak = stage.peak.highest.memory
    kinds = ("weights", "gradients", "optimizer", "activations", "workspace")
    held = {kind: at_peak.bytes_of(kind=kind) for kind in kinds}
    parts = ", ".join(f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in held.items() if num_bytes)
    fact, which = f"layers {'+'.join(map(str, plan.layers))} do not fit", "peak"
    if plan.proved_optimal and config.plan.objective == "peak":
        fact, which = f"no {config.plan.num_stages}-stage plan fits", "smallest peak"
    raise OverBudget(
        f"{fact} plan.budget={budget}: the {which} is {format_bytes(stage.device_bytes)}, in stage {stage.index} "
        f"({parts}), and with memory.reserve={reserve} it needs {format_bytes(needed)}.",
        **details,
    )


def save_bytes(plan: Plan, config: RunConfig) -> int:
    """Host memory of the copy that is saved while training continues: a rank's weights, adapters and optimizer states.

    Frozen weights that are quantized or offloaded are saved in full, at the training precision.
    """
    width = 2 if plan.precision == "bf16" else 4

    def saved(term: MemoryTerm) -> int:
        if term.component == "frozen_layers" and config.memory.packs_frozen:
            return term.num_parameters * width
        if term.component == "trained_layers" and config.memory.offload_weights:
            return term.num_bytes if term.kind in (HOST_WEIGHTS, HOST_OPTIMIZER) else 0
        return term.num_bytes if term.kind in ("weights", "optimizer", HOST, HOST_OPTIMIZER) else 0

    terms = [[term for term in cost.memory.terms if term.component != "fetched_layers"] for cost in plan.costs]
    return max(sum(map(saved, of_phase)) for of_phase in terms)


def check_host_budget(plan: Plan, budget_bytes: int, budget: str, config: RunConfig) -> None:
    """Check that a plan fits in host memory.

    Args:
        budget: the name of the budget in the message, such as "plan.host_budget".

    Raises:
        PlanInfeasible: a stage needs more host memory than the budget.
    """
    stage = max(plan.stages, key=lambda stage: stage.host_bytes)
    if stage.host_bytes <= budget_bytes:
        return
    raise PlanInfeasible(
        f"{budget}={format_bytes(budget_bytes)} is too little: stage {stage.index} keeps "
        f"{format_bytes(stage.host_bytes)} in host memory, and {format_bytes(stage.device_bytes)} on the device."
        f"{_ways_to_less_host_memory(config)}",
        host_budget_bytes=budget_bytes,
        host_bytes=stage.host_bytes,
        stage=stage.index,
    )


def _ways_to_less_host_memory(config: RunConfig) -> str:
    """Suggest settings that are not set yet, and an option to leave out that no other option needs."""
    memory = config.memory
    options = ("offload_activations", "offload_frozen", "offload_weights", "offload_optimizer")
    offloaded = [f"memory.{name}" for name in options if getattr(memory, name)]
    changes = []
    if memory.offload_optimizer:
        rules = {config.optim.name, config.optim.old_layers or config.optim.name, config.pet.rule}
        if memory.optimizer_states != "8bit" and all("8bit" in RULES[rule].states for rule in rules):
            changes.append("memory.optimizer_states=8bit")
        if memory.master_weights is not False and config.train.precision == "bf16":
            changes.append("memory.master_weights=false")
    ways = [f"set {' or '.join(changes)}"] if changes else []
    ways += [f"leave {offloaded[0]} out"] if offloaded else []
    told = ", or ".join(ways)
    return f" {told[0].upper()}{told[1:]}." if told else ""


def _make_schedule(prices: StagePrices, layers: tuple[int, ...]) -> Schedule:
    """Make the phases of all stages, in order."""
    config, tokens = prices.config, prices.tokens(layers)
    over_run = config.optim.schedule_over == "run"
    run_tokens = sum(of_stage.trained for of_stage in tokens)
    phases: list[Phase] = []
    seen = 0
    for stage, (sizes, of_stage) in enumerate(zip(new_and_old(layers), tokens, strict=True), start=1):
        began = seen
        for draft in prices.drafts(*sizes, of_stage.trained // config.step_tokens):
            phases.append(
                replace(
                    draft.phase,
                    index=len(phases) + 1,
                    stage=stage,
                    tokens=round(draft.steps) * config.step_tokens,
                    scheduled_tokens=run_tokens if over_run else of_stage.scheduled,
                    schedule_start_tokens=seen if over_run else seen - began,
                )
            )
            seen += phases[-1].tokens
    return Schedule(tuple(phases))


def _priced(schedule: Schedule, prices: StagePrices, *, proved_optimal: bool) -> Plan:
    config, shape = prices.config, prices.shape
    costs = [prices.cost_of_phase(phase) for phase in schedule.phases]
    distinct = {id(cost): cost for cost in costs}  # equal costs are the same object
    places = {key: index for index, key in enumerate(distinct)}
    vanilla = StagePrices(as_vanilla(config), shape)
    (whole,) = vanilla.drafts(shape.num_hidden_layers, 0)
    vanilla_cost = vanilla.cost_of_draft(whole)
    made = Plan(
        shape=shape,
        precision=config.train.precision,
        schedule=schedule,
        costs=tuple(distinct.values()),
        cost_indices=tuple(places[id(cost)] for cost in costs),
        proved_optimal=proved_optimal,
        vanilla_model_state_bytes=vanilla_cost.memory.total_bytes,
        vanilla_peak_bytes=None if vanilla_cost.peak is None else vanilla_cost.peak.total_bytes,
    )
    if config.plan.budget is not None:
        _check_budget(made, config.plan.budget, config)
    if config.plan.host_budget is not None:
        check_host_budget(made, config.plan.host_budget, "plan.host_budget", config)
    return made


def _choose_layers(prices: StagePrices) -> tuple[tuple[int, ...], bool]:
    """Choose n_1 … n_K, and tell whether no other choice has a lower peak."""
    options, cost, num_layers = prices.config.plan, prices.objective_bytes, prices.shape.num_hidden_layers
    if options.layers is not None and sum(options.layers) != num_layers:
        raise ConfigError(
            f"plan.layers {options.layers} adds up to {sum(options.layers)}, but the model has {num_layers} layers.",
            layers=options.layers,
            num_hidden_layers=num_layers,
        )
    best = SOLVERS[options.solver](cost, num_layers, options.num_stages)
    if options.layers is None:
        return prices.preferred(best), True
    by_hand = tuple(options.layers)
    return by_hand, peak_cost(cost, by_hand) == peak_cost(cost, best)
