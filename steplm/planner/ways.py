"""The ways to train among which ``steplm fit`` chooses, the cheapest first.

A way is a number of stages, a rank, the rungs of ``LADDER`` up to one of them, and ``OFFLOADED`` or not. What it gives
up has a price in points of judgement, since bytes and FLOPs alone would always choose the lowest rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from steplm.config import RunConfig, changed
from steplm.errors import ConfigError
from steplm.planner.ladder import LADDER, OFFLOADED, RUNGS, Changes, Rung
from steplm.planner.methods import METHODS
from steplm.planner.stages import StagePrices
from steplm.types import ModelShape
from steplm.units import nearest

VARY = ("stages", "rank", "options")
MAX_STAGES = 6
STAGE_PRICE = 1  # for each stage more or less than is written
# For each more where old layers are frozen, and gained for each less. A judgement, as the two were measured at
# different budgets: at 11M parameters a stage more cost 0.06 nats and above (docs/results.md), 8-bit states, no master
# weights and NF4 at most 0.01 (docs/memory.md).
FREEZING_STAGE_PRICE = 15
RANK_PRICE = 2  # for each halving: old layers can follow the new ones less


@dataclass(frozen=True)
class Way:
    """How to train, whatever the sizes."""

    price: int
    quality_price: int  # without the rungs that cost time alone
    num_stages: int
    options: tuple[str, ...]  # names of rungs
    changes: Changes  # of rank and options; not of ``plan.num_stages``


def ways(
    config: RunConfig, shape: ModelShape, vary: Collection[str], *, any_depth: bool = False
) -> tuple[list[Way], tuple[str, ...]]:
    """All ways, the one as written and then the cheapest first, and the options that are refused, with the reason.

    Args:
        vary: of ``VARY``; what it does not name stays as it is written.
        any_depth: whether there may be more stages than layers are written.

    Raises:
        ConfigError: an unknown name.
    """
    for name in vary:
        require_known("vary", name, VARY)
    rungs, skipped = _allowed_rungs(config, shape) if "options" in vary else ([], ())
    may_offload = "options" in vary and not config.memory.offload_optimizer
    may_offload = may_offload and _refusal(config, shape, [OFFLOADED]) is None
    counts = _stage_counts(config, any_depth) if "stages" in vary else {config.plan.num_stages}
    ranks = _ranks(config) if "rank" in vary else [config.pet.rank]
    found = _combined(config, rungs, counts, ranks, may_offload=may_offload)
    return sorted(found, key=lambda way: (not _is_as_written(way, config), way.price, -way.num_stages)), skipped


def without_time_options(way: Way) -> Iterator[Way]:
    """The same quality with each choice of those of its options that cost time alone, or with none of them."""
    rungs = [rung for rung in RUNGS if rung.name in way.options]
    time_alone = [rung for rung in rungs if not rung.quality]
    for size in range(len(time_alone) + 1):
        for kept in combinations(time_alone, size):
            options, changes = _together([rung for rung in rungs if rung.quality or rung in kept])
            yield replace(way, options=options, changes={"pet.rank": way.changes["pet.rank"], **changes})


def written(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def require_known(what: str, name: str, known: Collection[str]) -> None:
    """Raises ``ConfigError``, with the nearest name, where ``name`` is none of ``known``."""
    if name not in known:
        raise ConfigError(f"{what} has no {name!r}.{nearest(name, known)}", name=name)


def _combined(
    config: RunConfig,
    rungs: Sequence[Rung],
    counts: Collection[int],
    ranks: Sequence[int],
    *,
    may_offload: bool,
) -> Iterator[Way]:
    method = METHODS[config.method]
    for num_stages in counts:
        has_frozen = method.freezes and (num_stages > 1 or not method.grows)
        useful = [rung for rung in rungs if has_frozen or not rung.on_frozen]
        ladders = [useful]
        if config.plan.host_budget is not None:
            ladders.append([rung for rung in useful if not rung.on_host])
        heights = dict.fromkeys(tuple(ladder[:height]) for ladder in ladders for height in range(len(ladder) + 1))
        ranks_below = enumerate(ranks if has_frozen else ranks[:1])
        # Weights alone are then on the device, of which stages save little.
        choices = (False, True) if may_offload and num_stages == 1 else (False,)
        for (halvings, rank), rungs_below, offloads in product(ranks_below, heights, choices):
            taken = list(rungs_below)
            more = num_stages - config.plan.num_stages
            price = FREEZING_STAGE_PRICE * more if method.freezes else STAGE_PRICE * abs(more)
            price += RANK_PRICE * halvings
            quality = price + max((rung.price for rung in taken if rung.quality), default=0)
            if taken:
                price += taken[-1].price
            if taken and taken[-1].needs:  # it ends accumulation, and steps become smaller
                smaller_steps = round(math.log2(config.micro_batches))
                price, quality = price + smaller_steps, quality + smaller_steps
            if offloads:
                taken.append(OFFLOADED)
                price += OFFLOADED.price
            options, changes = _together(taken)
            yield Way(price, quality, num_stages, options, {"pet.rank": rank, **changes})


def _is_as_written(way: Way, config: RunConfig) -> bool:
    changes_nothing = all(written(config, key) == value for key, value in way.changes.items())
    return changes_nothing and way.num_stages == config.plan.num_stages


def _allowed_rungs(config: RunConfig, shape: ModelShape) -> tuple[list[Rung], tuple[str, ...]]:
    """The rungs above what is written that the configuration allows, and why not the others."""
    allowed, skipped = list[Rung](), list[str]()
    for rung in LADDER:
        _, before = _together(allowed)
        if before.get(rung.key, written(config, rung.key)) not in rung.replaces:
            continue
        if rung.on_frozen and not METHODS[config.method].freezes:
            skipped.append(f"{rung.name}: method={config.method} freezes no layer")
            continue
        if (refusal := _refusal(config, shape, [*allowed, rung])) is not None:
            skipped.append(f"{rung.name}: {refusal}")
        else:
            allowed.append(rung)
    return allowed, tuple(skipped)


def _refusal(config: RunConfig, shape: ModelShape, rungs: Sequence[Rung]) -> ConfigError | None:
    """Why the configuration does not allow these together; None where it does."""
    try:
        StagePrices(changed(config, _together(rungs)[1]), shape)
    except ConfigError as error:
        return error
    return None


def _together(rungs: Sequence[Rung]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and settings of rungs; of two that set the same key, the later one's."""
    last = {rung.key: rung for rung in rungs}
    changes = {key: value for rung in last.values() for key, value in ((rung.key, rung.value), *rung.needs)}
    return tuple(rung.name for rung in last.values()), changes


def _stage_counts(config: RunConfig, any_depth: bool) -> set[int]:
    """K that the configuration allows: its lists with an entry for each stage fix it."""
    plan = config.plan
    per_stage = (config.optim.learning_rate, plan.tokens_per_stage, plan.token_shares)
    if not METHODS[config.method].grows or any(isinstance(value, list) for value in per_stage):
        return {plan.num_stages}
    most = MAX_STAGES if any_depth else min(MAX_STAGES, config.model.num_hidden_layers)
    return {*range(1, most + 1), plan.num_stages}


def _ranks(config: RunConfig) -> list[int]:
    """As written, and the three powers of two below it, from 8 up."""
    if config.pet.method == "none" or not METHODS[config.method].freezes:
        return [config.pet.rank]
    lower = [2**k for k in range(3, 20) if 2**k < config.pet.rank]
    return [config.pet.rank, *reversed(lower[-3:])]
