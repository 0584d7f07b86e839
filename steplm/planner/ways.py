"""The ways to train that ``steplm fit`` chooses from, cheapest first.

A way combines a number of stages, an adapter rank, a prefix of ``LADDER`` and, optionally, of ``OFFLOADED``. Its price
rates the speed and quality it gives up, in points set by judgment: bytes and FLOPs alone would always favor the lowest
rank.
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
from steplm.planner.methods import METHODS, written
from steplm.planner.stages import StagePrices
from steplm.types import ModelShape
from steplm.units import nearest

VARY = ("stages", "rank", "options")
MAX_STAGES = 6
STAGE_PRICE = 1  # for each stage more or fewer than in the configuration
# For each additional stage where old layers are frozen; each stage fewer lowers the price by as much. Set by judgment,
# because stages and memory options were measured at different budgets: at 11M parameters, an additional stage cost at
# least 0.06 nats (docs/results.md), while 8-bit states, no master weights and NF4 cost at most 0.01 (docs/memory.md).
FREEZING_STAGE_PRICE = 15
RANK_PRICE = 2  # for each halving, which leaves old layers less able to adapt to new ones


@dataclass(frozen=True)
class Way:
    """A combination of training options, independent of model and batch sizes."""

    price: int
    quality_price: int  # the price without options that only cost time
    num_stages: int
    options: tuple[str, ...]  # names of memory options (``Rung.name``)
    changes: Changes  # to the rank and the options, but not to ``plan.num_stages``


def ways(
    config: RunConfig, shape: ModelShape, vary: Collection[str], *, any_depth: bool = False
) -> tuple[list[Way], tuple[str, ...]]:
    """All ways, first the one as written and then cheapest first, and the options not allowed, with the reason.

    Args:
        vary: names from ``VARY``; anything not named stays as written.
        any_depth: whether there may be more stages than the configuration has layers.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in vary:
        require_known("vary", name, VARY)
    counts = _stage_counts(config, any_depth) if "stages" in vary else {config.plan.num_stages}
    ranks = _ranks(config) if "rank" in vary else [config.pet.rank]
    found, skipped = list[Way](), dict[str, None]()
    for in_one in {count == 1 for count in counts}:  # an option may be for one stage alone, or for several
        these = {count for count in counts if (count == 1) is in_one}
        num_stages = config.plan.num_stages if config.plan.num_stages in these else min(these)
        example = changed(config, {"plan.num_stages": num_stages, "plan.layers": None})
        rungs, reasons = _allowed_rungs(example, shape) if "options" in vary else ([], ())
        offloads = _allowed_offloads(example, shape) if "options" in vary else []
        found += _combined(config, rungs, these, ranks, offloads)
        skipped |= dict.fromkeys(reasons)
    return sorted(found, key=lambda way: (not _is_as_written(way, config), way.price, -way.num_stages)), tuple(skipped)


def without_time_options(way: Way) -> Iterator[Way]:
    """Variants of a way with the same quality: one for each subset of the options that only cost time."""
    rungs = [rung for rung in RUNGS if rung.name in way.options]
    time_alone = [rung for rung in rungs if not rung.quality]
    for size in range(len(time_alone) + 1):
        for kept in combinations(time_alone, size):
            options, changes = _together([rung for rung in rungs if rung.quality or rung in kept])
            yield replace(way, options=options, changes={"pet.rank": way.changes["pet.rank"], **changes})


def require_known(what: str, name: str, known: Collection[str]) -> None:
    """Raise ``ConfigError``, suggesting the nearest name, if ``name`` is not in ``known``."""
    if name not in known:
        raise ConfigError(f"{what} has no {name!r}.{nearest(name, known)}", name=name)


def _combined(
    config: RunConfig,
    rungs: Sequence[Rung],
    counts: Collection[int],
    ranks: Sequence[int],
    offloads: Sequence[Rung],
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
        # With an offloaded optimizer only the weights stay on the device, and stages save little of those.
        extras = [offloads[:count] for count in range(len(offloads) + 1)] if num_stages == 1 else [[]]
        for (halvings, rank), rungs_below, added in product(ranks_below, heights, extras):
            taken = list(rungs_below)
            more = num_stages - config.plan.num_stages
            price = FREEZING_STAGE_PRICE * more if method.freezes else STAGE_PRICE * abs(more)
            price += RANK_PRICE * halvings
            quality = price + max((rung.price for rung in taken if rung.quality), default=0)
            if taken:
                price += taken[-1].price
            if taken and taken[-1].needs:  # it turns accumulation off, which makes steps smaller
                smaller_steps = round(math.log2(config.micro_batches))
                price, quality = price + smaller_steps, quality + smaller_steps
            if added:
                taken += added
                price += added[-1].price
            options, changes = _together(taken)
            yield Way(price, quality, num_stages, options, {"pet.rank": rank, **changes})


def _is_as_written(way: Way, config: RunConfig) -> bool:
    changes_nothing = all(written(config, key) == value for key, value in way.changes.items())
    return changes_nothing and way.num_stages == config.plan.num_stages


def _allowed_rungs(config: RunConfig, shape: ModelShape) -> tuple[list[Rung], tuple[str, ...]]:
    """The rungs beyond the options as written that the configuration allows, and why it does not allow the others."""
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


def _allowed_offloads(config: RunConfig, shape: ModelShape) -> list[Rung]:
    """The first rungs of ``OFFLOADED`` beyond the options as written, as many as the configuration allows."""
    missing = [rung for rung in OFFLOADED if not written(config, rung.key)]
    return next(missing[:n] for n in range(len(missing), -1, -1) if not n or not _refusal(config, shape, missing[:n]))


def _refusal(config: RunConfig, shape: ModelShape, rungs: Sequence[Rung]) -> ConfigError | None:
    """The error if the configuration does not allow these rungs together; None if it does."""
    try:
        StagePrices(changed(config, _together(rungs)[1]), shape)
    except ConfigError as error:
        return error
    return None


def _together(rungs: Sequence[Rung]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names and settings of rungs and of what they need; if two set the same key, the later one wins."""
    values = {key: value for rung in rungs for key, value in ((rung.key, rung.value), *rung.needs)}
    names = tuple(rung.name for rung in RUNGS if rung.key in values and values[rung.key] == rung.value)
    in_order = dict.fromkeys([*(rung.key for rung in RUNGS), *values])
    return names, {key: values[key] for key in in_order if key in values}


def _stage_counts(config: RunConfig, any_depth: bool) -> set[int]:
    """The values of K that the configuration allows; a list with one entry per stage fixes K."""
    plan = config.plan
    per_stage = (config.optim.learning_rate, plan.tokens_per_stage, plan.token_shares)
    if not METHODS[config.method].grows or any(isinstance(value, list) for value in per_stage):
        return {plan.num_stages}
    most = MAX_STAGES if any_depth else min(MAX_STAGES, config.model.num_hidden_layers)
    return {*range(1, most + 1), plan.num_stages}


def _ranks(config: RunConfig) -> list[int]:
    """The rank as written, then the three largest powers of two below it, none smaller than 8."""
    if config.pet.method == "none" or not METHODS[config.method].freezes:
        return [config.pet.rank]
    lower = [2**k for k in range(3, 20) if 2**k < config.pet.rank]
    return [config.pet.rank, *reversed(lower[-3:])]
