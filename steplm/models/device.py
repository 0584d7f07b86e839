"""The device of a run or an evaluation, by its name in YAML and on the command line."""

from __future__ import annotations

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
        raise ConfigError("the device is to be cuda, but PyTorch sees no CUDA device. Use cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def move(model: nn.Module, device: torch.device | str) -> None:
    """Put the model on the device, in place. What is there already is not touched: a fake tensor cannot be moved."""
    device = torch.device(device)
    if any(tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
        model.to(device)
