"""What ``torchrun``, or a compatible launcher, has set in the environment of this process."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether a launcher started this process, even as the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int | None:
    """The rank of this process; None if no launcher started it."""
    return int(os.environ["RANK"]) if is_launched() else None


def launched_size() -> int:
    """The number of processes; 1 if no launcher started this one."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1
