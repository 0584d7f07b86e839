"""The inverse of a plan: which training options fit a memory budget, and what they give up.

The search goes through ``steplm.planner.ways`` from the cheapest up. It keeps each way that allows a larger size, or
needs less memory, than all cheaper ones, so no row of the result is worse than another in every respect.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from steplm.config import RunConfig, changed
from steplm.cost.activations import is_modeled
from steplm.cost.seconds import Speeds
from steplm.errors import ConfigError, PlanInfeasible
from steplm.planner.ladder import AXES, Changes
from steplm.planner.methods import written
from steplm.planner.plan import plan as make_plan
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.solve import last_true, new_and_old, peak_cost, solve_within
from steplm.planner.stages import StagePrices
from steplm.planner.ways import VARY, Way, require_known, ways, without_time_options
from steplm.types import ModelShape
from steplm.units import as_yaml, format_bytes

MAX_ALTERNATIVES = 12


@dataclass(frozen=True)
class Alternative:
    """A way to train and its costs."""

    overrides: tuple[str, ...]  # ``section.key=value``, relative to the configuration as written
    num_stages: int
    layers: tuple[int, ...]  # n_1 … n_K
    rank: int | None  # None: no adapters
    options: tuple[str, ...]  # names of memory options (``Rung.name``)
    value: int | None  # of the maximized size; None: all sizes are as written
    num_parameters: int
    peak_bytes: int  # the model state only, for families without activation formulas
    model_state_bytes: int
    needed_bytes: int  # the peak plus the reserve
    host_bytes: int  # in host memory
    flops: int  # for the whole token budget, including recomputed activations
    price: int  # points for the speed and quality given up, relative to the run as written
    quality_price: int  # the share of the price that comes from lost quality
    fits: bool
    seconds: float | None  # for the whole token budget on the device; None: no device was given


@dataclass(frozen=True)
class FitResult:
    """The alternatives that fit, best first.

    They are ranked by value (largest first); then the run as written comes first; then by price, FLOPs and peak. If a
    device is given, quality price and seconds replace price and FLOPs.
    """

    budget_bytes: int
    reserve_bytes: int
    maximize: str | None
    alternatives: tuple[Alternative, ...]
    smallest: Alternative  # the lowest peak found
    skipped: tuple[str, ...]  # options that the configuration does not allow, with the reason
    at_limit: bool = False  # the largest value is bounded by the search range, not by the budget

    @property
    def best(self) -> Alternative:
        return self.alternatives[0]


def fit(
    config: RunConfig,
    budget_bytes: int,
    *,
    maximize: str | None = None,
    vary: Collection[str] = VARY,
    shape: ModelShape | None = None,
    speeds: Speeds | None = None,
) -> FitResult:
    """Find the ways to train that fit ``budget_bytes``, including the configuration's reserve.

    Args:
        config: the run as written; anything that ``maximize`` and ``vary`` do not name stays as it is. Ways that need
            more host memory than ``plan.host_budget`` are left out.
        maximize: None (keep the sizes as written), or a key of ``AXES``: "depth"; "width" (hidden size, with
            feed-forward size and heads in proportion); "batch" (the micro-batch, with less accumulation in return);
            "sequence" (in steps of the largest power of two, up to 64, that divides the written length).
        vary: any of "stages" (K from 1 to 6), "rank" (halved up to three times), "options" (``LADDER``).
        shape: as for ``steplm.planner.plan.plan``; its width cannot be changed.
        speeds: speeds of the device, to estimate and rank by training time.

    Raises:
        ConfigError: a name is unknown, or the configuration cannot be planned.
        PlanInfeasible: nothing fits; ``details["smallest"]`` is the ``Alternative`` with the least memory.
    """
    _require_known_peak(config, shape)
    search = _Search(config, budget_bytes, maximize, vary, shape, speeds)
    found = search.larger_values() if search.axis else list(search.lower_peaks())
    if not found:
        raise _nothing_fits(search)
    ranked = sorted(
        # Of equal prices the later one is better. Ways that differ only in time options may have become equal.
        {row.overrides: row for row in {(row.price, not row.overrides): row for row in found}.values()}.values(),
        key=_rank,
    )
    return FitResult(
        budget_bytes=budget_bytes,
        reserve_bytes=config.memory.reserve,
        maximize=maximize,
        alternatives=tuple(_spread(ranked) if maximize else ranked[:MAX_ALTERNATIVES]),
        smallest=min(found, key=lambda row: row.peak_bytes),
        skipped=search.skipped,
        at_limit=search.axis is not None and ranked[0].value == search.axis.value(config, search.axis.largest),
    )


def _rank(row: Alternative) -> tuple[float, ...]:
    """Sort key that puts the best alternative first."""
    is_changed, value = bool(row.overrides), -(row.value or 0)
    if row.seconds is not None:
        return value, is_changed, row.quality_price, row.seconds, row.peak_bytes
    return value, is_changed, row.price, row.flops, row.peak_bytes


def _require_known_peak(config: RunConfig, shape: ModelShape | None) -> None:
    if not is_modeled(shape or shape_from_hf_config(config.model.hf_config())):
        raise ConfigError(
            f"activations of model type {config.model.model_type!r} are not known by formula, so nothing can be said "
            "to fit. Count the peak of one configuration with `steplm plan RUN --simulate`.",
            model_type=config.model.model_type,
        )


def suggestions(config: RunConfig, budget_bytes: int, shape: ModelShape | None = None) -> str:
    """At most three of the cheapest changes that make the configuration fit, one per line, or why nothing fits."""
    search = _Search(config, budget_bytes, None, VARY, shape)
    rows = list(islice(search.lower_peaks(), 3))
    if not rows:
        return str(_nothing_fits(search))
    lines = [
        f"  {' '.join(row.overrides)}  ({format_bytes(row.needed_bytes)} with the reserve"
        f"{f', {format_bytes(row.host_bytes)} in host memory' if row.host_bytes else ''})"
        for row in rows
    ]
    return "\n".join(["These fit, the cheapest first:", *lines])


@dataclass(frozen=True)
class _Trial:
    """A way that fits at one size."""

    costs: StagePrices
    layers: tuple[int, ...]
    tokens: tuple[int, ...]  # trained in each stage
    peak_bytes: int


class _Search:
    """Search over all ways, cheapest first.

    A size is an index into the values of ``axis``; None means the size as written.
    """

    def __init__(
        self,
        config: RunConfig,
        budget_bytes: int,
        maximize: str | None,
        vary: Collection[str],
        shape: ModelShape | None,
        speeds: Speeds | None = None,
    ) -> None:
        if maximize is not None:
            require_known("maximize", maximize, AXES)
        if maximize == "width" and shape is not None:
            raise ConfigError(
                f"the width of model type {config.model.model_type!r} cannot be varied, as its parameters cannot be "
                "counted without the model: maximize depth, batch or sequence, or vary model.hidden_size by hand."
            )
        self.config, self.given_shape, self.speeds = config, shape, speeds
        self.budget_bytes = budget_bytes
        self.axis = None if maximize is None else AXES[maximize]
        self.varies_depth = maximize == "depth"
        self.limit = math.floor((budget_bytes - config.memory.reserve) / config.memory.correction)
        self.costs: dict[Any, StagePrices | None] = {}
        self.solved: dict[Any, tuple[int, ...] | None] = {}
        self.ways, self.skipped = ways(config, self._shape(config), vary, any_depth=self.varies_depth)

    def lower_peaks(self, limit: float | None = None, *, at_least_size: bool = False) -> Iterator[Alternative]:
        """Yield the ways within ``limit`` (default: the budget) whose peak is lower than that of all earlier ways.

        Sizes are as written or, with ``at_least_size``, the maximized one is at its smallest value.
        """
        limit = self.limit if limit is None else limit
        for way in self.ways:
            index = self._first_allowed(way) if at_least_size else None
            trial = self._try(way, index, limit)
            if trial is not None:
                limit = trial.peak_bytes - 1
                yield self._leanest(way, index, trial, trial.peak_bytes)

    def _leanest(self, way: Way, index: int | None, trial: _Trial, limit: float) -> Alternative:
        """The variant with the fewest time-only options within ``limit`` that needs no more host memory.

        With a device: the fastest variant that fits the budget, without time-only options that it does not need.
        """
        found, limit = self._alternative(way, index, trial), limit if self.speeds is None else self.limit
        trials = ((leaner, self._try(leaner, index, limit)) for leaner in without_time_options(way))
        rows = (self._alternative(leaner, index, trial) for leaner, trial in trials if trial is not None)
        if self.speeds is None:
            return next(row for row in rows if row.host_bytes <= found.host_bytes)  # the last variant is the way itself
        return min([found, *rows], key=lambda row: row.seconds or 0.0)

    def larger_values(self) -> list[Alternative]:
        """The ways that fit a larger value than all cheaper ways."""
        assert self.axis is not None
        found, largest = list[Alternative](), 0
        for way in self.ways:

            def fits(index: int, way: Way = way) -> bool:
                return self._try(way, index, self.limit) is not None

            start = self._first_allowed(way, above=largest)
            if start > self.axis.largest or not fits(start):
                continue
            largest = last_true(fits, start, self.axis.largest)
            trial = self._try(way, largest, self.limit)
            assert trial is not None
            found.append(self._leanest(way, largest, trial, self.limit))
        return found

    def smallest(self) -> Alternative:
        """The alternative with the lowest peak; a size that is being maximized is at its smallest value."""
        rows = list(self.lower_peaks(math.inf, at_least_size=self.axis is not None))
        if rows:
            return rows[-1]
        without_budgets = changed(self.config, {"plan.budget": None, "plan.host_budget": None})
        make_plan(without_budgets, self.given_shape)  # raises, with the reason, if the configuration is wrong
        host_budget = self.config.plan.host_budget
        if host_budget is None:
            raise ConfigError("no combination of options gives a valid plan")
        raise PlanInfeasible(
            f"every way to train needs more than plan.host_budget={format_bytes(host_budget)}: raise it, or leave "
            "out the memory.offload_* options that are set.",
            host_budget_bytes=host_budget,
        )

    def _first_allowed(self, way: Way, *, above: int = 0) -> int:
        """The smallest size above ``above`` that the configuration allows, searching up to the size as written.

        Small sizes may not be allowed: a width below the rank, or a micro-batch that makes accumulation necessary.
        """
        assert self.axis is not None
        start = max(above + 1, way.num_stages if self.varies_depth else 1)
        refused = {index: self._costs(way, index) is None for index in (start, self.axis.index(self.config))}
        written_index = max(refused)
        if not refused[start] or refused[written_index]:
            return start
        return last_true(lambda index: self._costs(way, index) is None, start, written_index) + 1

    def _try(self, way: Way, index: int | None, limit: float) -> _Trial | None:
        """Plan a way at a size; None if it exceeds ``limit`` or the host budget, or cannot be planned."""
        depth, costs = self._depth(index), self._costs(way, index)
        if costs is None or way.num_stages > depth:
            return None
        layers = self._layers(way, depth, costs, limit)
        if layers is None:
            return None
        peak_bytes, host_budget = peak_cost(costs.device_bytes, layers), self.config.plan.host_budget
        if peak_bytes > limit or (host_budget is not None and peak_cost(costs.host_bytes, layers) > host_budget):
            return None
        try:
            tokens = costs.tokens(layers)
        except ConfigError:  # less than one step per stage
            return None
        return _Trial(costs, layers, tuple(stage.trained for stage in tokens), peak_bytes)

    def _layers(self, way: Way, depth: int, costs: StagePrices, limit: float) -> tuple[int, ...] | None:
        """Layers per stage as the plan chooses them; None if they are known to need more than ``limit``."""
        if self._has_written_layers(way.num_stages, depth):
            return tuple(self.config.plan.layers or ())
        if self.config.plan.objective == "peak":
            return self._solve(costs, depth, way.num_stages, limit)
        # Independent of the batch size and the sequence length.
        key = (tuple(way.changes.items()), way.num_stages, depth, costs.shape)
        if key not in self.solved:
            self.solved[key] = self._solve(costs, depth, way.num_stages, math.inf)
        return self.solved[key]

    def _solve(self, costs: StagePrices, depth: int, num_stages: int, limit: float) -> tuple[int, ...] | None:
        layers = solve_within(costs.objective_bytes, depth, num_stages, limit)
        return None if layers is None else costs.preferred(layers)

    def _has_written_layers(self, num_stages: int, depth: int) -> bool:
        plan = self.config.plan
        as_written = num_stages == plan.num_stages and depth == self.config.model.num_hidden_layers
        return plan.layers is not None and as_written

    def _depth(self, index: int | None) -> int:
        return index if self.varies_depth and index is not None else self.config.model.num_hidden_layers

    def _costs(self, way: Way, index: int | None) -> StagePrices | None:
        """Stage prices, cached and shared by every K above 1 and every depth; None if the configuration is invalid."""
        key = (tuple(way.changes.items()), way.num_stages > 1, None if self.varies_depth else index)
        if key not in self.costs:
            changes = self._changes(way, AXES["depth"].largest if self.varies_depth else index)
            try:
                config = changed(self.config, changes)
                self.costs[key] = StagePrices(config, self._shape(config))
            except ConfigError:
                self.costs[key] = None
        return self.costs[key]

    def _shape(self, config: RunConfig) -> ModelShape:
        if self.given_shape is None:
            return shape_from_hf_config(config.model.hf_config())
        return replace(self.given_shape, num_hidden_layers=config.model.num_hidden_layers)

    def _alternative(self, way: Way, index: int | None, trial: _Trial) -> Alternative:
        costs, stages = trial.costs, new_and_old(trial.layers)
        flops = [costs.mean_flops_per_token(*stage, recomputed=True) for stage in stages]
        needed_bytes = self.config.memory.needed_bytes(trial.peak_bytes)
        return Alternative(
            overrides=tuple(f"{key}={as_yaml(value)}" for key, value in self._changes(way, index).items()),
            num_stages=way.num_stages,
            layers=trial.layers,
            rank=costs.config.pet.rank if costs.run.has_adapters else None,
            options=way.options,
            value=None if self.axis is None or index is None else self.axis.value(self.config, index),
            num_parameters=costs.shape.num_parameters(self._depth(index)),
            peak_bytes=trial.peak_bytes,
            model_state_bytes=peak_cost(costs.model_state_bytes, trial.layers),
            needed_bytes=needed_bytes,
            host_bytes=peak_cost(costs.host_bytes, trial.layers),
            flops=sum(count * each for count, each in zip(trial.tokens, flops, strict=True)),
            price=way.price,
            quality_price=way.quality_price,
            fits=needed_bytes <= self.budget_bytes,
            seconds=None if self.speeds is None else self._seconds(trial, self.speeds),
        )

    def _seconds(self, trial: _Trial, speeds: Speeds) -> float:
        costs = trial.costs
        step = [costs.mean_step_seconds(*stage, speeds) for stage in new_and_old(trial.layers)]
        return sum(tokens / costs.config.step_tokens * each for tokens, each in zip(trial.tokens, step, strict=True))

    def _changes(self, way: Way, index: int | None) -> Changes:
        """All changes relative to the configuration as written."""
        changes = {} if self.axis is None or index is None else dict(self.axis.changes(self.config, index))
        changes["plan.num_stages"] = way.num_stages
        if not self._has_written_layers(way.num_stages, self._depth(index)):
            changes["plan.layers"] = None
        if self.config.plan.budget is not None:
            changes["plan.budget"] = self.budget_bytes
        changes.update(way.changes)
        return {key: value for key, value in changes.items() if written(self.config, key) != value}


def _nothing_fits(search: _Search) -> PlanInfeasible:
    smallest, reserve = search.smallest(), search.config.memory.reserve
    how = f" with {' '.join(smallest.overrides)}" if smallest.overrides else ""
    return PlanInfeasible(
        f"nothing fits {format_bytes(search.budget_bytes)}: the smallest peak is {format_bytes(smallest.peak_bytes)}"
        f"{how}, and needs {format_bytes(smallest.needed_bytes)} with memory.reserve={format_bytes(reserve)}. "
        + (
            "The reserve alone exceeds the budget: raise the budget, or lower the reserve."
            if reserve >= search.budget_bytes
            else "Raise the budget, or lower the batch, the sequence length or the model."
        ),
        smallest=smallest,
        peak_bytes=smallest.peak_bytes,
        needed_bytes=smallest.needed_bytes,
        budget_bytes=search.budget_bytes,
    )


def _spread(rows: Sequence[Alternative]) -> list[Alternative]:
    """At most ``MAX_ALTERNATIVES`` evenly spaced rows, including the first and the last."""
    if len(rows) <= MAX_ALTERNATIVES:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (MAX_ALTERNATIVES - 1)] for i in range(MAX_ALTERNATIVES)]
