"""What ``torchrun``, or any launcher that does as it does, has told this process by its environment."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether this process is one of several, or of one, that a launcher started to work together."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int | None:
    """This process's number among all; None where it is alone."""
    return int(os.environ["RANK"]) if is_launched() else None


def launched_size() -> int:
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1
