"""Choose how many layers each stage adds: minimize the largest stage cost over positive n_1 … n_K with sum L.

A cost is a function ``cost(num_new, num_old) -> int``; ``num_old`` is 0 in stage 1 and only there.

Optima are not unique. Of all plans with the lowest peak, every solver here returns the one with the
largest n_1, then the largest n_2, and so on, so that the model is deep early.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, combinations, pairwise

from steplm.errors import PlanInfeasible

StageCost = Callable[[int, int], int]


def peak_cost(cost: StageCost, layers: tuple[int, ...]) -> int:
    """The largest stage cost of a plan."""
    return max(cost(new, old) for new, old in new_and_old(layers))


def new_and_old(layers: Sequence[int]) -> list[tuple[int, int]]:
    """The numbers of new and old layers in every stage."""
    return [(new, depth - new) for new, depth in zip(layers, accumulate(layers), strict=True)]


def solve_dynamic_programming(cost: StageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Solve exactly for any cost, in O(K L²) time.

    Raises:
        PlanInfeasible: more stages than layers.
    """
    _require_feasible(num_layers, num_stages)
    # least[N]: the lowest peak of any sequence of stages so far that reaches depth N.
    least = {depth: cost(depth, 0) for depth in range(1, num_layers + 1)}
    for stage in range(2, num_stages + 1):
        least = {
            depth: min(max(least[old], cost(depth - old, old)) for old in least if old < depth)
            for depth in range(stage, num_layers + 1)
        }
    return _largest_first(cost, num_layers, num_stages, peak=least[num_layers])


def solve_within(cost: StageCost, num_layers: int, num_stages: int, limit: float = math.inf) -> tuple[int, ...] | None:
    """Like the other solvers, with few cost evaluations; None if every plan costs more than ``limit``.

    Bisects the limit. Exact if an additional new layer never lowers the cost. If a new layer in place of an old one
    never lowers it either, each limit takes O(K log L) evaluations: the plan that is as deep as the limit allows, stage
    by stage, fails only if all plans do. Otherwise (e.g. if only new layers are recomputed) each limit takes O(K L).

    Raises:
        PlanInfeasible: more stages than layers.
    """
    _require_feasible(num_layers, num_stages)
    if cost(1, 0) > limit:
        return None
    new_cost_most = num_stages == 1 or _new_layers_cost_most(cost, num_layers)
    search = _deepest_within if new_cost_most else _any_within
    best, _ = search(cost, num_layers, num_stages, limit)
    if best is None:
        return None
    low, high = 0, peak_cost(cost, best)  # no plan is below ``low``
    while low < high:
        layers, refused = search(cost, num_layers, num_stages, (low + high) // 2)
        if layers is None:
            low = refused
        else:
            best, high = layers, peak_cost(cost, layers)
    return best


def solve_integer_programme(cost: StageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Solve by mixed-integer linear programming (HiGHS), as a division of the layers into K consecutive ranges.

    The variables are the peak t and one binary for each possible stage, a range of layers. The K stages taken cover
    every layer exactly once, and the cost of the stage that covers a layer is at most t, which is minimized.
    The solver proves the peak optimal; ties are broken as in the other solvers.

    Raises:
        PlanInfeasible: more stages than layers, or the solver finds no solution.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    _require_feasible(num_layers, num_stages)
    stages = list(combinations(range(num_layers + 1), 2))  # depth before and after
    costs = np.array([cost(depth - old, old) for old, depth in stages], dtype=float)
    # Costs are scaled by their spread, so that the solver's absolute tolerances mean the same for every model.
    scaled = (costs - costs.min()) / max(np.ptp(costs), 1.0)
    covers = np.array([[float(old <= layer < depth) for old, depth in stages] for layer in range(num_layers)])
    is_stage = np.append(np.ones(len(stages)), 0.0)  # the last variable is t
    result = milp(
        1.0 - is_stage,
        integrality=is_stage,
        bounds=Bounds(0.0, np.append(np.ones(len(stages)), np.inf)),
        constraints=[
            LinearConstraint(is_stage, num_stages, num_stages),
            LinearConstraint(np.column_stack([covers, np.zeros(num_layers)]), 1.0, 1.0),
            LinearConstraint(np.column_stack([covers * scaled, -np.ones(num_layers)]), -np.inf, 0.0),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise PlanInfeasible(
            f"the solver found no {num_stages}-stage plan of {num_layers} layers ({result.message}). "
            "Set plan.solver to dynamic_programming.",
            num_layers=num_layers,
            num_stages=num_stages,
        )
    taken = (stage for stage, value in zip(stages, result.x, strict=False) if value > 0.5)
    layers = tuple(depth - old for old, depth in taken)
    return _largest_first(cost, num_layers, num_stages, peak=peak_cost(cost, layers))


def solve_exhaustive(cost: StageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Try every composition of L into K parts, as a reference for the other solvers.

    Raises:
        PlanInfeasible: more stages than layers.
    """
    _require_feasible(num_layers, num_stages)
    plans = []
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        depths = (0, *cuts, num_layers)
        plans.append(tuple(upper - lower for lower, upper in pairwise(depths)))
    return min(plans, key=lambda layers: (peak_cost(cost, layers), tuple(-new for new in layers)))


def _new_layers_cost_most(cost: StageCost, num_layers: int) -> bool:
    """Whether a new layer costs at least as much as an old one; costs are almost linear, so a few points suffice."""
    depths = {depth for depth in (num_layers, num_layers // 2 + 1, 3) if 3 <= depth <= num_layers}
    return all(
        cost(new, depth - new) <= cost(new + 1, depth - new - 1)
        for depth in depths
        for new in {1, 2, 3, depth // 2, depth - 3, depth - 2}
        if 1 <= new <= depth - 2
    )


def _deepest_within(
    cost: StageCost, num_layers: int, num_stages: int, limit: float
) -> tuple[tuple[int, ...] | None, int]:
    """The plan that adds as many layers as ``limit`` allows, stage by stage, or None; then the lowest cost rejected."""
    layers: list[int] = []
    refused: list[int] = []

    def is_allowed(num_new: int) -> bool:
        found = cost(num_new, sum(layers))
        if found > limit:
            refused.append(found)
        return found <= limit

    for later_stages in reversed(range(num_stages)):
        most = num_layers - sum(layers) - later_stages
        least = 1 if later_stages else most  # the last stage takes all remaining layers
        if not is_allowed(least):
            return None, min(refused)
        layers.append(last_true(is_allowed, least, most))
    return tuple(layers), min(refused, default=0)


def _any_within(cost: StageCost, num_layers: int, num_stages: int, limit: float) -> tuple[tuple[int, ...] | None, int]:
    """The plan within ``limit`` that is deepest early, or None; then the lowest cost rejected."""

    def step_cost(old: int, depth: int) -> int:
        return cost(depth - old, old)

    # depths[k]: depths from which k more stages reach the full depth within the limit. To see whether another stage can
    # precede these, it is enough to check its smallest step, which costs the least.
    depths, refused = [[num_layers]], math.inf
    for stage in reversed(range(num_stages)):
        later = depths[-1]
        before = range(stage, later[-1]) if stage else (0,)
        costs = {old: step_cost(old, later[bisect_right(later, old)]) for old in before}
        refused = min([refused, *(found for found in costs.values() if found > limit)])
        depths.append([old for old, found in costs.items() if found <= limit])
        if not depths[-1]:
            return None, int(refused)
    path = [0]
    for later in reversed(depths[:-1]):
        nearest = bisect_right(later, path[-1])
        path.append(later[bisect_right(later, limit, lo=nearest, key=partial(step_cost, path[-1])) - 1])
    return tuple(depth - old for old, depth in pairwise(path)), 0


def last_true(test: Callable[[int], bool], low: int, high: int) -> int:
    """The last of ``low`` … ``high`` that passes, given that ``low`` passes and that all passing values come first.

    Steps are doubled and then halved, so values far above the answer are never tried.
    """
    step = 1
    while low < high:
        probe = min(low + step, high)
        if test(probe):
            low, step = probe, 2 * step
        else:
            high, step = probe - 1, max(1, (probe - low) // 2)
    return low


def _largest_first(cost: StageCost, num_layers: int, num_stages: int, *, peak: int) -> tuple[int, ...]:
    """Of the plans within ``peak``, the one with the largest n_1, then n_2, and so on."""
    # can_finish[k]: depths from which k more stages reach the full depth within the peak.
    can_finish = [{num_layers}]
    for _ in range(num_stages):
        can_finish.append(
            {
                old
                for old in range(num_layers)
                if any(depth > old and cost(depth - old, old) <= peak for depth in can_finish[-1])
            }
        )
    depths = [0]
    for ways in reversed(can_finish[:-1]):
        old = depths[-1]
        depths.append(max(depth for depth in ways if depth > old and cost(depth - old, old) <= peak))
    return tuple(upper - lower for lower, upper in pairwise(depths))


def _require_feasible(num_layers: int, num_stages: int) -> None:
    if not 1 <= num_stages <= num_layers:
        raise PlanInfeasible(
            f"no plan divides {num_layers} layers into {num_stages} stages: every stage adds at least one. "
            f"Set plan.num_stages between 1 and {num_layers}, or raise model.num_hidden_layers.",
            num_layers=num_layers,
            num_stages=num_stages,
        )


SOLVERS: dict[str, Callable[[StageCost, int, int], tuple[int, ...]]] = {
    "dynamic_programming": solve_dynamic_programming,
    "integer_programme": solve_integer_programme,
}
