"""Model-state bytes of instruction tuning, planned and measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from steplm.cost.terms import WEIGHT_BYTES

# Weights and gradients in fp32 (bf16 uses autocast), and Adam's two moments: 16 bytes, like pre-training's 2 + 2 + 12.
TRAINED_BYTES = 4 + 4 + 8


@dataclass(frozen=True)
class ModelState:
    """Parameter counts, and the model-state bytes that they take in training."""

    num_trained: int
    num_frozen: int
    precision: str  # of frozen weights

    @property
    def num_bytes(self) -> int:
        return TRAINED_BYTES * self.num_trained + WEIGHT_BYTES[self.precision] * self.num_frozen


def model_state(model: nn.Module, precision: str) -> ModelState:
    """Count the model's parameters, including adapters; tied parameters count once."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelState(trained, total - trained, precision)


def measured_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the existing weights, gradients and optimizer states, excluding Adam's step counters."""
    parameters = list(model.parameters())
    tensors = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
