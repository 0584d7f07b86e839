"""Instruction tuning: turns a Hugging Face folder and instruction records into a model for ``steplm chat``.

from steplm.sft import instruction_tune, load_sft_config

config = load_sft_config(None, ["lora_rank=8", "num_train_epochs=1"])
result = instruction_tune("runs/my-run/export", ["alpaca.json"], config)
print(result.validation_loss, result.export_dir)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# name -> module, imported on first use, so that a configuration can be checked before torch is loaded.
_PUBLIC = {
    "ALPACA_TEMPLATE": "steplm.sft.templates",
    "Conversation": "steplm.sft.records",
    "Encoder": "steplm.sft.encode",
    "SftConfig": "steplm.sft.config",
    "SftResult": "steplm.sft.types",
    "instruction_tune": "steplm.sft.run",
    "load_sft_config": "steplm.sft.config",
    "prepare_records": "steplm.sft.prepare",
    "read_conversations": "steplm.sft.records",
}

__all__ = [
    "ALPACA_TEMPLATE",
    "Conversation",
    "Encoder",
    "SftConfig",
    "SftResult",
    "instruction_tune",
    "load_sft_config",
    "prepare_records",
    "read_conversations",
]

if TYPE_CHECKING:
    from steplm.sft.config import SftConfig, load_sft_config
    from steplm.sft.encode import Encoder
    from steplm.sft.prepare import prepare_records
    from steplm.sft.records import Conversation, read_conversations
    from steplm.sft.run import instruction_tune
    from steplm.sft.templates import ALPACA_TEMPLATE
    from steplm.sft.types import SftResult


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'steplm.sft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
