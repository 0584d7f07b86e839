"""Optimizers and learning-rate schedules. To add an optimizer: one file, and a line in ``OPTIMIZERS``."""

from __future__ import annotations

from steplm.optim.adamw import MasterAdamW

OPTIMIZERS = {
    "adamw": MasterAdamW,
}
