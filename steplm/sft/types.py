"""Types shared by the modules of instruction tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steplm.cost.terms import WEIGHT_BYTES
from steplm.sft.config import SftConfig

if TYPE_CHECKING:
    from torch import nn

# Weights and gradients in fp32 (bf16 uses autocast), and Adam's two moments: 16 bytes, like pre-training's 2 + 2 + 12.
TRAINED_BYTES = 4 + 4 + 8


@dataclass(frozen=True)
class SftResult:
    """The result of a run; losses are in nats per answer token, ``None`` if nothing was held out."""

    output_dir: Path
    finished: bool
    stop_signal: int | None = None
    export_dir: Path | None = None
    num_steps: int | None = None
    train_loss: float | None = None  # mean over the steps of the last epoch
    validation_loss_before: float | None = None
    validation_loss: float | None = None  # of the exported model


@dataclass(frozen=True)
class Schedule:
    """How many steps a run takes, and how often it saves."""

    num_steps: int
    steps_per_epoch: int
    save_steps: int

    @staticmethod
    def of(config: SftConfig, num_sequences: int) -> Schedule:
        """Count steps as ``Trainer`` does: the last step of an epoch may be smaller."""
        micro_batches = math.ceil(num_sequences / config.per_device_train_batch_size)
        steps_per_epoch = math.ceil(micro_batches / config.gradient_accumulation_steps)
        num_steps = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)
        return Schedule(num_steps, steps_per_epoch, config.save_steps or math.ceil(num_steps / 5))


@dataclass(frozen=True)
class ModelState:
    """Parameter counts, and the model-state bytes that they take in training."""

    num_trained: int
    num_frozen: int
    precision: str  # of frozen weights

    @staticmethod
    def of(model: nn.Module, precision: str) -> ModelState:
        """Count the model's parameters, including adapters; tied parameters count once."""
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in model.parameters())
        return ModelState(trained, total - trained, precision)

    @property
    def num_bytes(self) -> int:
        return TRAINED_BYTES * self.num_trained + WEIGHT_BYTES[self.precision] * self.num_frozen
