"""The inverse plan: what fits a budget, and what it gives up.

Candidates are the settings that ``vary`` lets change: the number of stages, the rank, and a rung of ``LADDER``. Each
has a price, in points of judgement (``Rung.price``, ``RANK_PRICE``, ``STAGE_PRICE``), since bytes and FLOPs alone
would always choose the lowest rank. The search goes from the cheapest candidate up and keeps those that hold more, or
less memory, than all cheaper ones; so no row of the answer is worse than another in everything.

Where a new layer never needs less memory than an old one, the division is found by bisection, in few costs; elsewhere
(as when only new layers are recomputed) by the solver of the plan, or fixed where that would take too long.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, islice, product
from types import MappingProxyType
from typing import Any

from steplm.config import RunConfig, validated
from steplm.errors import ConfigError, PlanInfeasible
from steplm.planner.plan import StageCosts
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.solve import StageCost, peak_cost, solve_dynamic_programming
from steplm.planner.tokens import stage_tokens
from steplm.types import ModelShape
from steplm.units import format_bytes

Changes = Mapping[str, Any]  # "section.key" -> value

VARY = ("stages", "rank", "options")
MAX_STAGES = 6
MAX_ALTERNATIVES = 12
STAGE_PRICE = 1  # for each stage more or less: STEP found no loss, but fewer tokens see the whole model
DEEP = 48  # layers; the plan's solver takes the square of them, so that deeper irregular runs get ``plan.layers``
LEAST_SAVING = 0.01  # a rung that saves a smaller share of the peak is left out
RANK_PRICE = 2  # for each halving: old layers can follow the new ones less


@dataclass(frozen=True)
class Rung:
    """One more memory option, on top of those before it in ``LADDER``."""

    name: str
    price: int
    settings: tuple[tuple[str, Any, tuple[Any, ...]], ...]  # key, value, and the values that it may replace
    time: str
    quality: str
    needs: tuple[tuple[str, Any], ...] = ()  # settings without which the configuration refuses it


# First what changes no number of the training and costs time alone, the quicker first (8-bit states stand among
# them: they cost next to no time, and the transfers may cost much where a micro-batch is short); then what changes
# numbers, those of frozen weights last, as they are dequantised in every pass and merged with an error. The fused
# update comes at the end: with accumulation it changes the tokens of a step, and the learning rate with them.
LADDER: tuple[Rung, ...] = (
    Rung("as written", 0, (), "none", "none"),
    Rung(
        "recompute frozen layers",
        1,
        (("train.gradient_checkpointing", "frozen", (False,)),),
        "one more forward pass of the frozen layers",
        "none",
    ),
    Rung(
        "recompute all layers",
        2,
        (("train.gradient_checkpointing", True, (False, "frozen", "new")),),
        "one more forward pass of all layers",
        "none",
    ),
    Rung(
        "8-bit states",
        4,
        (("memory.optimizer_states", "8bit", ("fp32",)),),
        "a longer update, once a step",
        "moments rounded to 8 bits in blocks; within noise in its source",
    ),
    Rung(
        "frozen in host memory",
        6,
        (("memory.offload_frozen", True, (False,)),),
        "frozen weights cross the bus twice a micro-batch, beside the computing",
        "none",
    ),
    Rung(
        "activations in host memory",
        8,
        (("memory.offload_activations", True, (False,)),),
        "activations cross the bus twice a micro-batch",
        "none",
    ),
    Rung(
        "no master weights",
        10,
        (("memory.master_weights", False, (True,)),),
        "none",
        "updates are rounded to bf16, stochastically",
    ),
    Rung(
        "int8 frozen",
        12,
        (("memory.frozen_weights", "int8", ("full",)),),
        "frozen layers are dequantised in every pass",
        "frozen layers rounded to 8 bits at each growth",
    ),
    Rung(
        "nf4 frozen",
        14,
        (("memory.frozen_weights", "nf4", ("full", "int8")),),
        "frozen layers are dequantised in every pass",
        "frozen layers rounded to 4 bits at each growth",
    ),
    Rung(
        "adapters on embeddings",
        17,
        (("plan.train_embeddings", "adapters", ("always",)),),
        "none",
        "after stage 1 embeddings and head learn through their adapters only",
    ),
    Rung(
        "fused backward",
        18,
        (("memory.fused_backward", True, (False,)),),
        "none",
        "no clipping, and every micro-batch is a step",
        (("train.gradient_accumulation_steps", 1), ("optim.max_grad_norm", None)),
    ),
)


@dataclass(frozen=True)
class Axis:
    """A size to maximise, in whole steps."""

    index: Callable[[RunConfig], int]  # of the written value, from 1
    value: Callable[[RunConfig, int], int]
    changes: Callable[[RunConfig, int], Changes]  # at an index
    largest: int  # index at which the search stops


def _width_unit(config: RunConfig) -> int:
    """Query heads for each head of keys and values: the least that can be added."""
    model = config.model
    return model.num_attention_heads // (model.num_key_value_heads or model.num_attention_heads)


def _hidden_size(config: RunConfig, index: int) -> int:
    model = config.model
    return index * _width_unit(config) * model.hidden_size // model.num_attention_heads


def _width_changes(config: RunConfig, index: int) -> Changes:
    model = config.model
    hidden_size = _hidden_size(config, index)
    if hidden_size == model.hidden_size:
        return {}
    changes = {
        "model.hidden_size": hidden_size,
        "model.intermediate_size": max(16, 16 * round(hidden_size * model.intermediate_size / model.hidden_size / 16)),
        "model.num_attention_heads": index * _width_unit(config),
    }
    return changes if model.num_key_value_heads is None else {**changes, "model.num_key_value_heads": index}


def _batch_changes(config: RunConfig, index: int) -> Changes:
    train = config.train
    micro_batches = train.per_device_train_batch_size * train.gradient_accumulation_steps / index
    return {
        "train.per_device_train_batch_size": index,
        "train.gradient_accumulation_steps": max(1, round(micro_batches)),
    }


def _sequence_unit(config: RunConfig) -> int:
    """The largest power of two, up to 64, in the written length: lengths that devices like stay so."""
    return math.gcd(64, config.train.sequence_length)


def _sequence_changes(config: RunConfig, index: int) -> Changes:
    length = index * _sequence_unit(config)
    changes = {"train.sequence_length": length}
    if length > config.model.max_position_embeddings:
        changes["model.max_position_embeddings"] = length
    return changes


AXES: dict[str, Axis] = {
    "depth": Axis(
        lambda config: config.model.num_hidden_layers,
        lambda config, index: index,
        lambda config, index: {"model.num_hidden_layers": index},
        1024,
    ),
    "width": Axis(
        lambda config: config.model.num_key_value_heads or config.model.num_attention_heads,
        _hidden_size,
        _width_changes,
        4096,
    ),
    "batch": Axis(
        lambda config: config.train.per_device_train_batch_size,
        lambda config, index: index,
        _batch_changes,
        2**16,
    ),
    "sequence": Axis(
        lambda config: config.train.sequence_length // _sequence_unit(config),
        lambda config, index: index * _sequence_unit(config),
        _sequence_changes,
        2**24,
    ),
}


@dataclass(frozen=True)
class Alternative:
    """One way to train, and what it needs."""

    overrides: tuple[str, ...]  # ``section.key=value``, against the configuration as written
    num_stages: int
    layers: tuple[int, ...]  # n_1 … n_K
    rank: int | None  # None: no adapters
    options: tuple[str, ...]  # names of rungs
    value: int | None  # of what is maximised
    num_parameters: int
    peak_bytes: int  # the model state, for families whose layers are not known
    model_state_bytes: int
    needed_bytes: int  # the peak and the reserve
    flops: int  # of the whole token budget, recomputed activations counted
    price: int  # points: what it gives up in time and quality
    fits: bool


@dataclass(frozen=True)
class FitResult:
    """What fits, ranked by value (largest first), price, FLOPs and peak."""

    budget_bytes: int
    reserve_bytes: int
    maximize: str | None
    alternatives: tuple[Alternative, ...]
    smallest: Alternative  # the least memory of all that was found
    skipped: tuple[str, ...]  # options that the configuration refuses, with the reason
    at_limit: bool = False  # the largest value is where the search stops, not where the budget ends

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
) -> FitResult:
    """The ways of training that fit ``budget_bytes``, the configuration's reserve included.

    Args:
        config: the run as written; what neither ``maximize`` nor ``vary`` names stays as it is.
        maximize: None (the sizes are as written), or a key of ``AXES``: "depth"; "width" (hidden size, with
            feed-forward size and heads in proportion); "batch" (of a micro-batch, accumulation lowered with it);
            "sequence" (in steps of the largest power of two, up to 64, of the written length).
        vary: of "stages" (K from 1 to 6), "rank" (halved up to three times), "options" (``LADDER``).
        shape: as for ``steplm.planner.plan.plan``; its width cannot be changed.

    Raises:
        ConfigError: an unknown name, or a configuration that cannot be planned.
        PlanInfeasible: nothing fits; ``details["smallest"]`` is the ``Alternative`` with the least memory.
    """
    search = _Search(config, budget_bytes, maximize, vary, shape)
    found = search.largest_values() if maximize else list(search.lower_peaks(search.limit))
    if not found:
        raise _nothing_fits(search)
    ranked = sorted(
        {row.price: row for row in found}.values(),  # of equal prices the later one is better
        key=lambda row: (-(row.value or 0), row.price, row.flops, row.peak_bytes),
    )
    return FitResult(
        budget_bytes=budget_bytes,
        reserve_bytes=config.memory.reserve,
        maximize=maximize,
        alternatives=tuple(_spread(ranked) if maximize else ranked[:MAX_ALTERNATIVES]),
        smallest=min(found, key=lambda row: row.peak_bytes),
        skipped=search.skipped,
        at_limit=search.at_limit,
    )


def suggestions(config: RunConfig, budget_bytes: int, shape: ModelShape | None = None) -> str:
    """The cheapest changes that make the configuration fit, at most three, one in a line; or what is missing."""
    search = _Search(config, budget_bytes, None, VARY, shape)
    rows = list(islice(search.lower_peaks(search.limit), 3))
    if not rows:
        return str(_nothing_fits(search))
    lines = [f"  {' '.join(row.overrides)}  ({format_bytes(row.needed_bytes)} with the reserve)" for row in rows]
    return "\n".join(["These fit, the cheapest first:", *lines])


def divide(cost: StageCost, num_layers: int, num_stages: int, limit: int) -> tuple[tuple[int, ...] | None, int]:
    """The division within ``limit`` that is deep earliest, or None; and the least cost that was refused."""
    layers: list[int] = []
    refused = [2**63]

    def allowed(num_new: int, num_old: int) -> bool:
        found = cost(num_new, num_old)
        if found > limit:
            refused.append(found)
        return found <= limit

    for stage in range(1, num_stages + 1):
        old = sum(layers)
        most = num_layers - old - (num_stages - stage)
        if stage == num_stages:
            new = most if allowed(most, old) else 0
        else:
            new = _last_true(lambda count, old=old: allowed(count, old), 0, most)  # type: ignore[misc]
        if new == 0:
            return None, min(refused)
        layers.append(new)
    return tuple(layers), min(refused)


def solve_bisection(cost: StageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """As ``steplm.planner.solve.SOLVERS``, in O(K log L) costs for each of a few dozen limits.

    Exact where one more new layer, and a new one in place of an old one, never cost less.
    """
    best, _ = divide(cost, num_layers, num_stages, 2**62)
    assert best is not None
    low, high = 0, peak_cost(cost, best)  # no limit below ``low`` can be kept
    while low < high:
        layers, refused = divide(cost, num_layers, num_stages, (low + high) // 2)
        if layers is None:
            low = refused
        else:
            best, high = layers, peak_cost(cost, layers)
    return best


@dataclass(frozen=True)
class _Bundle:
    """A rung and those before it."""

    price: int
    options: tuple[str, ...]
    changes: Changes


@dataclass(frozen=True)
class _Candidate:
    price: int
    num_stages: int
    options: tuple[str, ...]
    changes: Changes  # of rank and options, not of K


@dataclass
class _Case:
    """A configuration with everything chosen but K, and its costs for every K."""

    config: RunConfig
    shape: ModelShape
    table: dict[tuple[int, int], int] = field(default_factory=dict)
    solved: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def costs(self) -> StageCosts:
        return StageCosts(self.config, self.shape)

    def cost(self, num_new: int, num_old: int) -> int:
        key = (num_new, num_old)
        if key not in self.table:
            self.table[key] = self.costs.peak_bytes(num_new, num_old)
        return self.table[key]

    def is_regular(self, depth: int) -> bool:
        """Whether a new layer costs at least as much as an old one, at the depths where most is held."""
        depths = [each for each in {depth, depth // 2 + 1, 3} if 3 <= each <= depth]
        return all(self.cost(1, each - 1) <= self.cost(2, each - 2) for each in depths)

    def divide(self, depth: int, num_stages: int, limit: int) -> tuple[int, ...] | None:
        """A division whose stages cost ``limit`` at most, or None."""
        layers, _ = divide(self.cost, depth, num_stages, limit)
        if layers is None and num_stages > 1 and depth <= DEEP and not self.is_regular(depth):
            best = self.solve(depth, num_stages)
            layers = best if peak_cost(self.cost, best) <= limit else None
        return layers

    def solve(self, depth: int, num_stages: int) -> tuple[int, ...]:
        """The division that the plan chooses; of a deep irregular run one that may need a little more."""
        key = (depth, num_stages)
        if key not in self.solved:
            regular = num_stages == 1 or depth > DEEP or self.is_regular(depth)
            self.solved[key] = (solve_bisection if regular else solve_dynamic_programming)(self.cost, *key)
        return self.solved[key]

    def device_bytes(self, layers: tuple[int, ...]) -> int:
        """Of the largest stage, whatever the plan minimises."""
        if self.config.plan.objective == "peak":
            return peak_cost(self.cost, layers)
        peaks = [self.costs.peak(*stage) for stage in _stages(layers)]
        if any(peak is None for peak in peaks):
            return peak_cost(self.cost, layers)
        return max(peak.total_bytes for peak in peaks if peak is not None)


class _Search:
    def __init__(
        self,
        config: RunConfig,
        budget_bytes: int,
        maximize: str | None,
        vary: Collection[str],
        shape: ModelShape | None,
    ) -> None:
        for name in vary:
            require_known("vary", name, VARY)
        if maximize is not None:
            require_known("maximize", maximize, AXES)
        if maximize == "width" and shape is not None:
            raise ConfigError(
                f"the width of model type {config.model.model_type!r} cannot be varied, as its parameters cannot be "
                "counted without the model: maximize depth, batch or sequence, or vary model.hidden_size by hand."
            )
        self.config, self.given_shape, self.vary = config, shape, vary
        self.budget_bytes = budget_bytes
        self.limit = math.floor((budget_bytes - config.memory.reserve) / config.memory.correction)
        self.axis = None if maximize is None else AXES[maximize]
        self.written_index = 1 if self.axis is None else self.axis.index(config)
        self.values = config.model_dump(mode="json")
        self.cases: dict[tuple[Any, ...], _Case | None] = {}
        self.at_limit = False
        self.stage_counts = self._counts()
        bundles, self.skipped = self._rungs()
        self.candidates = sorted(self._candidates(bundles), key=lambda c: (c.price, -c.num_stages))

    def lower_peaks(self, limit: float) -> Iterator[Alternative]:
        """From the cheapest up, at the sizes as written, those within ``limit`` and lower than all before them."""
        index = self.written_index
        for candidate in self.candidates:
            if self._fits(candidate, index, limit):
                alternative = self._alternative(candidate, index, self._layers(candidate, index))
                limit = alternative.peak_bytes - 1
                yield alternative

    def largest_values(self) -> list[Alternative]:
        """From the cheapest up, those that hold more than all before them."""
        assert self.axis is not None
        found, largest = list[Alternative](), 0
        for candidate in self.candidates:
            fits = partial(self._fits_budget, candidate)
            start = max(largest + 1, candidate.num_stages if self.axis is AXES["depth"] else 1)
            if start <= self.axis.largest and fits(start):
                largest = _last_true(fits, start, self.axis.largest)
                found.append(self._alternative(candidate, largest, self._layers(candidate, largest)))
        self.at_limit = largest == self.axis.largest
        return found

    def smallest(self) -> Alternative:
        """The least memory there is, at the sizes as written or, where one is maximised, at its least value."""
        if self.axis is not None:
            self.written_index = 1
        rows = list(self.lower_peaks(math.inf))
        if not rows:
            raise ConfigError("no settings make a plan: run `steplm plan` for the reason")
        return rows[-1]

    def _rungs(self) -> tuple[list[_Bundle], tuple[str, ...]]:
        """The rungs that the configuration allows and that save something, each with those before it."""
        rungs, skipped = list[tuple[Rung, Changes, bool]](), list[str]()
        together: Changes = {}
        for rung in LADDER[1:] if "options" in self.vary else ():
            added = {key: value for key, value, old in rung.settings if self._get(key, together) in old}
            needs = {key: value for key, value in rung.needs if self._get(key, together) != value}
            changes = {**together, **added, **needs}
            if not added:
                continue
            try:
                self._configure(changes)
            except ConfigError as error:
                skipped.append(f"{rung.name}: {error}")
                continue
            rungs.append((rung, {**added, **needs}, bool(needs)))
            together = changes
        bundles = [_Bundle(0, (), {})]
        for rung, settings, brings in rungs:
            names, before = bundles[-1].options, bundles[-1].changes
            others = [each for other, each, _ in rungs if other is not rung]
            without = {key: value for each in others for key, value in each.items()}
            changes = {**before, **settings}
            if not self._saves(changes, before) and not self._saves(together, without):
                skipped.append(f"{rung.name}: saves less than {LEAST_SAVING:.0%} here")
                continue
            price = rung.price + round(math.log2(self.config.train.gradient_accumulation_steps)) * brings
            bundles.append(_Bundle(price, (*names, rung.name), changes))
        return bundles, tuple(skipped)

    def _saves(self, changes: Changes, before: Changes) -> bool:
        """Whether ``changes`` need less than ``before``, at the sizes as written, in the largest number of stages."""
        peaks = []
        for each in (changes, before):
            candidate = _Candidate(0, max(self.stage_counts), (), each)
            if not self._fits(candidate, self.written_index, math.inf):
                return True  # the sizes as written make no plan: then others decide
            case = self._case(candidate, self.written_index)
            assert case is not None
            peaks.append(case.device_bytes(self._layers(candidate, self.written_index)))
        return peaks[0] < (1 - LEAST_SAVING) * peaks[1]

    def _counts(self) -> set[int]:
        """K that the configuration allows: its lists with an entry for each stage fix it."""
        plan, depth = self.config.plan, self.config.model.num_hidden_layers
        per_stage = (self.config.optim.learning_rate, plan.tokens_per_stage, plan.token_shares)
        if "stages" not in self.vary or any(isinstance(value, list) for value in per_stage):
            return {plan.num_stages}
        most = MAX_STAGES if self.axis is AXES["depth"] else min(MAX_STAGES, depth)
        return {*range(1, most + 1), plan.num_stages}

    def _candidates(self, bundles: Sequence[_Bundle]) -> Iterator[_Candidate]:
        config, written, rank = self.config, self.config.plan.num_stages, self.config.pet.rank
        ranks = [rank]
        if "rank" in self.vary and config.pet.method != "none" and config.plan.freeze_old_layers:
            powers = [2**k for k in range(3, 20) if 2**k < rank]
            ranks += reversed(powers[-3:])
        for count, (halvings, low_rank), bundle in product(self.stage_counts, enumerate(ranks), bundles):
            if halvings and count == 1:
                continue  # there are no adapters
            price = bundle.price + STAGE_PRICE * abs(count - written) + RANK_PRICE * halvings
            changes = {"pet.rank": low_rank, **bundle.changes} if halvings else bundle.changes
            yield _Candidate(price, count, bundle.options, changes)

    def _fits_budget(self, candidate: _Candidate, index: int) -> bool:
        return self._fits(candidate, index, self.limit)

    def _fits(self, candidate: _Candidate, index: int, limit: float) -> bool:
        """Whether the device's bytes are within ``limit`` and the token budget has a step for each stage."""
        case, depth = self._case(candidate, index), self._depth(index)
        if case is None or candidate.num_stages > depth:
            return False
        if case.config.plan.objective == "peak" and self._by_hand(candidate, depth) is None and limit < math.inf:
            layers = case.divide(depth, candidate.num_stages, int(limit))
            if layers is None:
                return False
            if self._least_steps(candidate, index, layers) >= 8:  # then the plan's own layers have some too
                return True
        layers = self._layers(candidate, index)
        return case.device_bytes(layers) <= limit and self._least_steps(candidate, index, layers) > 0

    def _layers(self, candidate: _Candidate, index: int) -> tuple[int, ...]:
        """n_1 … n_K as the plan chooses them."""
        case, depth = self._case(candidate, index), self._depth(index)
        assert case is not None
        by_hand = self._by_hand(candidate, depth)
        if by_hand is not None:
            return by_hand
        best = case.solve(depth, candidate.num_stages)
        if not case.config.plan.freeze_old_layers:
            equal_parts = divide_equally(depth, candidate.num_stages)
            if peak_cost(case.cost, equal_parts) == peak_cost(case.cost, best):
                return equal_parts
        return best

    def _by_hand(self, candidate: _Candidate, depth: int) -> tuple[int, ...] | None:
        plan = self.config.plan
        as_written = candidate.num_stages == plan.num_stages and depth == self.config.model.num_hidden_layers
        return tuple(plan.layers) if plan.layers is not None and as_written else None

    def _depth(self, index: int) -> int:
        return index if self.axis is AXES["depth"] else self.config.model.num_hidden_layers

    def _case(self, candidate: _Candidate, index: int) -> _Case | None:
        """Shared by all K that have adapters; None where the configuration is refused."""
        by_depth = self.axis is AXES["depth"]  # costs are the same at every depth
        key = (tuple(candidate.changes.items()), candidate.num_stages > 1, 0 if by_depth else index)
        if key not in self.cases:
            changes = self._changes(candidate, AXES["depth"].largest if by_depth else index)
            try:
                config = self._configure(changes)
                case = _Case(config, self._shape(config))
                _ = case.costs
            except ConfigError:
                self.cases[key] = None
            else:
                self.cases[key] = case
        return self.cases[key]

    def _shape(self, config: RunConfig) -> ModelShape:
        if self.given_shape is None:
            return shape_from_hf_config(config.model.hf_config())
        return replace(self.given_shape, num_hidden_layers=config.model.num_hidden_layers)

    def _alternative(self, candidate: _Candidate, index: int, layers: tuple[int, ...]) -> Alternative:
        case, changes, depth = self._case(candidate, index), dict(self._changes(candidate, index)), self._depth(index)
        assert case is not None
        if depth > DEEP and candidate.num_stages > 1 and not case.is_regular(depth):
            changes["plan.layers"] = list(layers)  # the plan alone might choose others
        config = self._configure(changes)
        tokens = self._tokens(candidate, index, layers)
        flops = [
            case.costs.flops_per_token(*stage) + recomputed_flops_per_token(case.costs, *stage)
            for stage in _stages(layers)
        ]
        peak_bytes = case.device_bytes(layers)
        needed_bytes = config.memory.needed_bytes(peak_bytes)
        has_adapters = bool(case.costs.adapter_matrices)
        return Alternative(
            overrides=tuple(f"{key}={_as_yaml(value)}" for key, value in changes.items()),
            num_stages=candidate.num_stages,
            layers=layers,
            rank=config.pet.rank if has_adapters else None,
            options=candidate.options,
            value=None if self.axis is None else self.axis.value(self.config, index),
            num_parameters=self._shape(config).num_parameters(),
            peak_bytes=peak_bytes,
            model_state_bytes=max(case.costs.model_state(*stage).total_bytes for stage in _stages(layers)),
            needed_bytes=needed_bytes,
            flops=sum(count * each for count, each in zip(tokens, flops, strict=True)),
            price=candidate.price,
            fits=needed_bytes <= self.budget_bytes,
        )

    def _least_steps(self, candidate: _Candidate, index: int, layers: tuple[int, ...]) -> int:
        """Optimizer steps of the shortest stage; 0 where the token budget has too few."""
        case = self._case(candidate, index)
        assert case is not None
        try:
            return min(self._tokens(candidate, index, layers)) // _step_tokens(case.config)
        except ConfigError:
            return 0

    def _tokens(self, candidate: _Candidate, index: int, layers: tuple[int, ...]) -> list[int]:
        case = self._case(candidate, index)
        assert case is not None
        stages = stage_tokens(
            case.config.plan,
            layers,
            step_tokens=_step_tokens(case.config),
            num_parameters=case.shape.num_parameters(self._depth(index)),
            flops_per_token=[case.costs.flops_per_token(*stage) for stage in _stages(layers)],
        )
        return [stage.trained for stage in stages]

    def _changes(self, candidate: _Candidate, index: int) -> Changes:
        """All that differs from the configuration as written."""
        plan = self.config.plan
        changes = dict(self.axis.changes(self.config, index)) if self.axis is not None else {}
        changes["plan.num_stages"] = candidate.num_stages
        if self._by_hand(candidate, self._depth(index)) is None:
            changes["plan.layers"] = None
        if plan.budget is not None:
            changes["plan.budget"] = self.budget_bytes
        return {key: value for key, value in {**changes, **candidate.changes}.items() if self._get(key) != value}

    def _get(self, key: str, changes: Changes = MappingProxyType({})) -> Any:
        section, _, name = key.partition(".")
        return changes[key] if key in changes else self.values[section][name]

    def _configure(self, changes: Changes) -> RunConfig:
        values = dict(self.values)
        for key, value in changes.items():
            section, _, name = key.partition(".")
            values[section] = {**values[section], name: value}
        return validated(RunConfig, values)


def recomputed_flops_per_token(costs: StageCosts, num_new: int, num_old: int) -> int:
    """Of the second forward pass of the layers that ``train.gradient_checkpointing`` names."""
    config, shape = costs.config, costs.shape
    frozen = num_old if config.plan.freeze_old_layers else 0
    new = num_new + num_old - frozen
    choice = config.train.gradient_checkpointing
    layers = new * (choice in (True, "new")) + frozen * (choice in (True, "frozen"))
    matrices = sum(linear.in_features * linear.out_features for linear in shape.linears)
    attention = 4 * config.train.sequence_length * (shape.attention_size or shape.hidden_size)
    adapters = 2 * frozen * sum(costs.adapter_matrices) * (choice in (True, "frozen"))
    return layers * (2 * matrices + attention) + adapters


def divide_equally(num_layers: int, num_stages: int) -> tuple[int, ...]:
    smaller, remainder = divmod(num_layers, num_stages)
    return tuple(smaller + (stage < remainder) for stage in range(num_stages))


def require_known(what: str, name: str, known: Collection[str]) -> None:
    """Raises ``ConfigError``, with the nearest name, where ``name`` is none of ``known``."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
        raise ConfigError(f"{what} has no {name!r}. {hint}", name=name)


def _nothing_fits(search: _Search) -> PlanInfeasible:
    smallest, reserve = search.smallest(), search.config.memory.reserve
    how = f" with {' '.join(smallest.overrides)}" if smallest.overrides else ""
    return PlanInfeasible(
        f"nothing fits {format_bytes(search.budget_bytes)}: the smallest peak is {format_bytes(smallest.peak_bytes)}"
        f"{how}, and needs {format_bytes(smallest.needed_bytes)} with memory.reserve={format_bytes(reserve)}. "
        "Raise the budget, or lower the batch, the sequence length or the model.",
        smallest=smallest,
        peak_bytes=smallest.peak_bytes,
        needed_bytes=smallest.needed_bytes,
        budget_bytes=search.budget_bytes,
    )


def _spread(rows: Sequence[Alternative]) -> list[Alternative]:
    """At most ``MAX_ALTERNATIVES`` of them, evenly, the first and the last included."""
    if len(rows) <= MAX_ALTERNATIVES:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (MAX_ALTERNATIVES - 1)] for i in range(MAX_ALTERNATIVES)]


def _stages(layers: Sequence[int]) -> list[tuple[int, int]]:
    """New and old layers of every stage."""
    return [(new, depth - new) for new, depth in zip(layers, accumulate(layers), strict=True)]


def _step_tokens(config: RunConfig) -> int:
    train = config.train
    return train.sequence_length * train.per_device_train_batch_size * train.gradient_accumulation_steps


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _last_true(test: Callable[[int], bool], low: int, high: int) -> int:
    """The last of ``low`` … ``high`` that passes, where ``low`` does and all that pass come first."""
    step = 1
    while low < high:  # gallop up, then halve what is left
        probe = min(low + step, high)
        if test(probe):
            low, step = probe, 2 * step
        else:
            high, step = probe - 1, max(1, (probe - 1 - low + 1) // 2)
    return low
