"""Model-state bytes of instruction tuning, planned and measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from steplm.cost.terms import WEIGHT_BYTES

# Weights and gradients in fp32 (under autocast, where precision is bf16), and Adam's two moments: 16 bytes, as in
# pre-training's 2 + 2 + 12.
TRAINED_BYTES = 4 + 4 + 8


@dataclass(frozen=True)
class ModelState:
    """Parameters and the bytes that training holds of them."""

    num_trained: int
    num_frozen: int
    precision: str  # of frozen weights

    @property
    def num_bytes(self) -> int:
        return TRAINED_BYTES * self.num_trained + WEIGHT_BYTES[self.precision] * self.num_frozen


def model_state(model: nn.Module, precision: str) -> ModelState:
    """By the model's own parameters, adapters included; a tied one counts once."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelState(trained, total - trained, precision)


def measured_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and optimizer states that there are; Adam's counters of steps are left out."""
    parameters = list(model.parameters())
    tensors = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
