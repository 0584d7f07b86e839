"""How many layers each stage adds: minimise the largest stage cost over positive n_1 … n_K with sum L.

A cost is a function ``cost(num_new, num_old) -> int``; ``num_old`` is 0 exactly in stage 1.

Optima are not unique. Of all plans with the least peak, every solver here returns the one whose
n_1 is largest, among those the one whose n_2 is largest, and so on: the model is deep early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

from steplm.errors import PlanInfeasible

StageCost = Callable[[int, int], int]


@dataclass(frozen=True)
class LinearStageCost:
    """Bytes of a stage, linear in its layers; stage 1 may have another constant than the later ones."""

    new_layer: int
    old_layer: int
    first_stage: int
    later_stage: int

    def __call__(self, num_new: int, num_old: int) -> int:
        constant = self.first_stage if num_old == 0 else self.later_stage
        return self.new_layer * num_new + self.old_layer * num_old + constant


def peak_cost(cost: StageCost, layers: tuple[int, ...]) -> int:
    """The largest stage cost of a plan."""
    return max(cost(new, total - new) for new, total in zip(layers, accumulate(layers), strict=True))


def solve_dynamic_programming(cost: StageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Exact for any cost, in O(K L²) time.

    Raises:
        PlanInfeasible: more stages than layers.
    """
    _require_feasible(num_layers, num_stages)
    # least[N]: the least peak of a run whose stages so far have made N layers.
    least = {depth: cost(depth, 0) for depth in range(1, num_layers + 1)}
    for stage in range(2, num_stages + 1):
        least = {
            depth: min(max(least[old], cost(depth - old, old)) for old in least if old < depth)
            for depth in range(stage, num_layers + 1)
        }
    return _largest_first(cost, num_layers, num_stages, peak=least[num_layers])


def solve_integer_programme(cost: LinearStageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """By mixed-integer linear programming (HiGHS), for linear costs.

    Variables are n_1 … n_K and the peak t: minimise t subject to ``cost_i(n) <= t`` for every stage and
    ``sum n = L``. The solver proves the peak; the choice among its optima is the same as elsewhere.

    Raises:
        PlanInfeasible: more stages than layers, or the solver gives up.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    _require_feasible(num_layers, num_stages)
    new, old = np.eye(num_stages), np.tril(np.ones((num_stages, num_stages)), -1)
    constants = np.array([cost.first_stage] + [cost.later_stage] * (num_stages - 1))
    # In units of one layer and above the constant that all stages share, so that the solver's absolute
    # tolerances mean the same for every model.
    unit, shared = max(cost.new_layer, cost.old_layer, 1), constants.min()
    stage_costs = np.hstack([(cost.new_layer * new + cost.old_layer * old) / unit, -np.ones((num_stages, 1))])
    is_layer_count = np.append(np.ones(num_stages), 0.0)
    result = milp(
        1.0 - is_layer_count,
        integrality=is_layer_count,
        bounds=Bounds(np.append(np.ones(num_stages), -np.inf), np.append(np.full(num_stages, num_layers), np.inf)),
        constraints=[
            LinearConstraint(stage_costs, -np.inf, -(constants - shared) / unit),
            LinearConstraint(is_layer_count[None, :], num_layers, num_layers),
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
    layers = tuple(round(count) for count in result.x[:num_stages])
    return _largest_first(cost, num_layers, num_stages, peak=peak_cost(cost, layers))


def solve_exhaustive(cost: StageCost, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Every composition of L into K parts: the reference for the others.

    Raises:
        PlanInfeasible: more stages than layers.
    """
    _require_feasible(num_layers, num_stages)
    plans = []
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        depths = (0, *cuts, num_layers)
        plans.append(tuple(upper - lower for lower, upper in pairwise(depths)))
    return min(plans, key=lambda layers: (peak_cost(cost, layers), tuple(-new for new in layers)))


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
