"""Plans of steplm 0.1 runs, whose ``plan.json`` has stages instead of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from steplm.config import RunConfig
from steplm.planner.plan import Plan, plan
from steplm.planner.shape import FAMILIES
from steplm.types import ModelShape, from_json

OLD_SCHEMA_VERSION = 2


def plan_of_old_run(config: RunConfig, values: Mapping[str, Any]) -> tuple[Plan, tuple[int, ...]]:
    """Rebuild the plan from the run's configuration, and map each stage of the old file to its stage in the plan.

    The old file counts each restart of adapters as a stage.

    Args:
        config: the run's own ``config.yaml``.
        values: its ``plan.json``.

    Raises:
        KeyError, TypeError, ValueError: ``values`` is not such a plan, or belongs to another model.
        ConfigError, PlanInfeasible: as for ``plan``.
    """
    new_layers = [stage["num_new_layers"] for stage in values["stages"]]
    if sum(new_layers) != config.model.num_hidden_layers:  # fail before any per-layer computation
        raise ValueError(f"{sum(new_layers)} layers, but config.yaml has {config.model.num_hidden_layers}")
    changes = {"layers": [n for n in new_layers if n], "budget": None, "host_budget": None}
    options = config.plan.model_copy(update=changes)
    # Shapes written by the first runs lack the tensors of embeddings and norms.
    shape = None if config.model.model_type in FAMILIES else from_json(ModelShape, values["shape"])
    return plan(config.model_copy(update={"plan": options}), shape), tuple(accumulate(map(bool, new_layers)))
