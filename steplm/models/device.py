"""The device of a run or an evaluation, by its name in YAML and on the command line."""

from __future__ import annotations

import gc
import os

import torch
from torch import nn

from steplm.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: another name, or CUDA where there is none.
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
    """Let CUDA's allocator give tensors the bytes that they have, and lose little between them.

    By default it gives a large tensor up to 1 MiB more, and cannot join what is free in different blocks. Nothing is
    changed where the user has set the allocator, or it is in use already.
    """
    if not ({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys() or torch.cuda.is_initialized()):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_memory() -> None:
    """Let go of models that nobody uses any more: reference cycles among them, and what CUDA's allocator keeps."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def move(model: nn.Module, device: torch.device | str) -> None:
    """Put the model on the device, in place. What is there already is not touched: a fake tensor cannot be moved."""
    device = torch.device(device)
    if any(tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
        model.to(device)
