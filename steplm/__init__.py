"""Staged parameter-efficient pre-training (STEP) of language models, with memory use known before the run.

    from steplm import load_config, plan, train, export

    config = load_config("run.yaml", ["plan.num_stages=3"])
    print(plan(config).peak_model_state_bytes)
    result = train(config)

Importing this package does not import torch; accessing ``train``, ``grow`` or ``export`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steplm.version import __version__

# name -> module. Imported on first use, so that planning starts instantly.
_PUBLIC = {
    "RunConfig": "steplm.config",
    "load_config": "steplm.planner.auto",
    "SteplmError": "steplm.errors",
    "Plan": "steplm.planner.plan",
    "Stage": "steplm.planner.plan",
    "plan": "steplm.planner.plan",
    "prepare": "steplm.data.prepare",
    "train": "steplm.training.run",
    "export": "steplm.training.export",
    "grow": "steplm.training.grow_folder",
    "perplexity": "steplm.eval.perplexity",
}

__all__ = [
    "Plan",
    "RunConfig",
    "Stage",
    "SteplmError",
    "__version__",
    "export",
    "grow",
    "load_config",
    "perplexity",
    "plan",
    "prepare",
    "train",
]

if TYPE_CHECKING:
    from steplm.config import RunConfig
    from steplm.data.prepare import prepare
    from steplm.errors import SteplmError
    from steplm.eval.perplexity import perplexity
    from steplm.planner.auto import load_config
    from steplm.planner.plan import Plan, Stage, plan
    from steplm.training.export import export
    from steplm.training.grow_folder import grow
    from steplm.training.run import train


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'steplm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
