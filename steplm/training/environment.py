"""The device, the versions and the command of a run."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from steplm.units import format_count
from steplm.version import __version__


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The device, the versions and the command: what a reader needs to judge a number."""
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "num_devices": torch.cuda.device_count() if cuda else 0,
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "steplm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def crowded_processors(tokens_per_second: float, before: float) -> str | None:
    """Where steps have become slow and the processors have more work than they can do: what can be set; else None."""
    num_cpus, num_threads = os.cpu_count() or 1, torch.get_num_threads()
    try:
        load = os.getloadavg()[0]
    except OSError:  # a system that does not count it
        return None
    if load <= num_cpus:
        return None
    advice = "Leave other work for later"
    if num_threads > 1:  # threads wait for each other, so each waits for the one that other work holds up
        advice += ", or start again with train.num_threads=1: fewer threads lose less to it"
    share = f"{num_threads} thread{'s' * (num_threads > 1)} of this run share{'s' * (num_threads == 1)}"
    return (
        f"{format_count(tokens_per_second)} tok/s after {format_count(before)}: {share} {num_cpus} processors with "
        f"other work (load {load:.1f}). {advice}."
    )


def free_host_bytes() -> int | None:
    """What a process may take of the host's memory, without swap, and of its control group's; None if not known."""
    limits = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # "max" where there is none
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits, default=None)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
