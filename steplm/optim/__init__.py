"""Update rules for any training loop; ``RuleOptimizer`` wraps them as a ``torch.optim.Optimizer``.

    from steplm.optim import AdamW, Muon, RuleOptimizer

    optimizer = RuleOptimizer([Muon(hidden_matrices), AdamW(all_else)], lr=1e-3)

Names are imported on first use, so importing a schedule does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "AdamW": "steplm.optim.adamw",
    "LowRankAdamW": "steplm.optim.low_rank",
    "Muon": "steplm.optim.muon",
    "RuleOptimizer": "steplm.optim.torch_optimizer",
    "SCALE": "steplm.optim.scale",
    "TorchRule": "steplm.optim.torch_optimizer",
}

__all__ = ["SCALE", "AdamW", "LowRankAdamW", "Muon", "RuleOptimizer", "TorchRule"]

if TYPE_CHECKING:
    from steplm.optim.adamw import AdamW
    from steplm.optim.low_rank import LowRankAdamW
    from steplm.optim.muon import Muon
    from steplm.optim.scale import SCALE
    from steplm.optim.torch_optimizer import RuleOptimizer, TorchRule


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'steplm.optim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
