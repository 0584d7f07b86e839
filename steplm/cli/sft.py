"""``steplm sft``."""

from __future__ import annotations

from pathlib import Path

from steplm.cli.model_paths import find_model, require_hub
from steplm.sft.config import load_sft_config


def run_sft(model: str, data: list[str], overrides: list[str], *, config: Path | None, output: Path | None) -> int:
    checked = load_sft_config(config, overrides)
    found = find_model(model)
    if any(entry.startswith("hub://") for entry in data):
        require_hub()
    from steplm.sft.run import instruction_tune

    result = instruction_tune(found, data, checked, output_dir=output, say=lambda line: print(line, flush=True))
    return 0 if result.stop_signal is None else 128 + result.stop_signal
