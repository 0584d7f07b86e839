"""The environment of a run: device, versions, command, and load of the machine."""

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
    """The device, the versions, and the command, which a reader needs to interpret measurements."""
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
    """Advice for slow steps if the CPUs are overloaded; else None."""
    num_cpus, num_threads = os.cpu_count() or 1, torch.get_num_threads()
    try:
        load = os.getloadavg()[0]
    except OSError:  # not available on this system
        return None
    if load <= num_cpus:
        return None
    advice = "Leave other work for later"
    if num_threads > 1:  # threads synchronize, so all wait for the one that other work delays
        advice += ", or start again with train.num_threads=1: fewer threads lose less to it"
    share = f"{num_threads} thread{'s' * (num_threads > 1)} of this run share{'s' * (num_threads == 1)}"
    return (
        f"{format_count(tokens_per_second)} tok/s after {format_count(before)}: {share} {num_cpus} processors with "
        f"other work (load {load:.1f}). {advice}."
    )


def free_host_bytes() -> int | None:
    """Memory that this process can still use, within the host (without swap) and its cgroup; None if unknown."""
    limits = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # "max" if there is no limit
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits, default=None)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
