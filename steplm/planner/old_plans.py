"""Plans of runs of steplm 0.1, whose ``plan.json`` has stages in place of a schedule."""

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
    """The plan, made again from the run's configuration, and its stage for each stage in the old file.

    The old file counts each restart of adapters as a stage.

    Args:
        config: the run's own ``config.yaml``.
        values: its ``plan.json``.

    Raises:
        KeyError, TypeError, ValueError: ``values`` is not such a plan, or is of another model.
        ConfigError, PlanInfeasible: as ``plan`` does.
    """
    new_layers = [stage["num_new_layers"] for stage in values["stages"]]
    if sum(new_layers) != config.model.num_hidden_layers:  # before anything is computed for each layer
        raise ValueError(f"{sum(new_layers)} layers, but config.yaml has {config.model.num_hidden_layers}")
    changes = {"layers": [n for n in new_layers if n], "budget": None, "host_budget": None}
    options = config.plan.model_copy(update=changes)
    # The shapes that the first runs wrote lack the embeddings' and norms' tensors.
    shape = None if config.model.model_type in FAMILIES else from_json(ModelShape, values["shape"])
    return plan(config.model_copy(update={"plan": options}), shape), tuple(accumulate(map(bool, new_layers)))
