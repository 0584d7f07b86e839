"""State shared by the modules of a run: config, plan, data, log, and processes. Contains no training logic."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from steplm.checkpoint.shards import Background
from steplm.config import RunConfig
from steplm.cost.devices import published_flops
from steplm.data.loader import BatchLoader, Prefetcher
from steplm.data.tokens import Manifest, TokenDataset
from steplm.distributed.world import World
from steplm.planner.plan import Plan
from steplm.training.display import Display
from steplm.training.metrics import MetricsLog


@dataclass
class RunContext:
    """State shared by all phases of a run."""

    config: RunConfig
    plan: Plan
    manifest: Manifest
    loader: BatchLoader
    batches: Prefetcher  # prefetches the loader's training batches
    validation: dict[str, TokenDataset]  # by name; the first one gives the run's validation loss
    metrics: MetricsLog
    display: Display
    world: World
    writer: Background = field(default_factory=Background)  # writes checkpoints; a BackgroundWriter on several ranks
    seconds_before: float = 0.0  # training time of earlier processes
    started_at: float = field(default_factory=time.monotonic)
    last_checkpoint: Path | None = None
    saved_at: float = field(default_factory=time.monotonic)
    requested_signal: int | None = None  # received by this process
    stop_signal: int | None = None  # agreed on by all ranks, which stop at the same step

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def checkpoints_dir(self) -> Path:
        return self.config.run_dir / "checkpoints"

    @property
    def elapsed_seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started_at

    @cached_property
    def _peak_flops(self) -> float | None:
        """Published peak FLOP/s of all devices together."""
        if self.device.type != "cuda":
            return None
        of_one = published_flops(torch.cuda.get_device_name(self.device), self.config.train.precision)
        return None if of_one is None else of_one * self.world.size

    def mfu(self, flops_per_second: float) -> float | None:
        """Model FLOPs utilization, as a share of the published peak; None if the device's peak is unknown.

        Recomputed activations do not count. Source: PaLM (arXiv 2204.02311), appendix B.
        """
        return None if self._peak_flops is None else flops_per_second / self._peak_flops

    def agree_to_stop(self) -> None:
        """Make a signal to one rank stop all ranks at the same step; a later signal waits for the next step."""
        requested = self.requested_signal  # read once: it can change at any time
        if self.world.any(requested):
            self.stop_signal = requested or signal.SIGTERM
