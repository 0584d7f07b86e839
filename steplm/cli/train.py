"""``steplm train``."""

from __future__ import annotations

from steplm.config import load_config
from steplm.training.run import train


def run_train(run: str, overrides: list[str]) -> int:
    result = train(load_config(run, overrides))
    return 0 if result.stop_signal is None else 128 + result.stop_signal
