"""Device selection and memory management for runs and evaluations."""

from __future__ import annotations

import gc
import os

import torch
from torch import nn

from steplm.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu`` or ``cuda`` to a device.

    Raises:
        ConfigError: the name is unknown, or CUDA is not available.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}: use auto, cpu or cuda", device=name)
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch sees no CUDA device. Use cpu or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _allocate_exactly()
    return torch.device("cuda")


def _allocate_exactly() -> None:
    """Make the CUDA allocator use expandable segments, to reduce rounding and fragmentation.

    By default it allocates up to 1 MiB more for a large tensor, and cannot merge free memory of different blocks.
    Nothing is changed if the user has configured the allocator or CUDA is already initialized.
    """
    if not ({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys() or torch.cuda.is_initialized()):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_memory() -> None:
    """Free the memory of unused models, including reference cycles and the CUDA allocator's cache."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def move(model: nn.Module, device: torch.device | str) -> None:
    """Move the model to the device in place; do nothing if it is already there, as fake tensors cannot be moved."""
    device = torch.device(device)
    if any(tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
        model.to(device)
