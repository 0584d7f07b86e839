"""Types shared by the modules of instruction tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from steplm.sft.config import SftConfig


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
