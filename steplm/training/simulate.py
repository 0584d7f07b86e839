"""Two steps of a real stage, run to see what they hold: on fake tensors, in seconds and in no memory, or on real ones.

Fake tensors have a shape, a device and no data. They run the code that training runs, so that all it allocates is
counted; not seen are the insides of kernels, and the device's context, libraries and fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from steplm.config import RunConfig
from steplm.memory.count import ByteCounter
from steplm.models.build import DTYPES, hf_config, initial_state
from steplm.models.forward import batch_loss
from steplm.optim.adamw import AdamW, global_grad_norm
from steplm.training.stage import StageStart, assemble
from steplm.types import HOST, Instant, MemoryEstimate, MemoryTerm, PeakEstimate, Stage, TrainState

AT_REST, FORWARD, BACKWARD, STEP = "between steps", "forward", "backward", "optimizer step"
NUM_STEPS = 2  # the second meets what the first left behind


def simulate_stage(config: RunConfig, stage: Stage) -> PeakEstimate:
    """What the device would hold at most in each part of a stage's step, counted on fake tensors.

    The kinds of the terms are ``weights``, ``gradients``, ``optimizer``, ``rest`` (activations and workspace)
    and ``host``. A compiled model is counted as if it were not.
    """
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    shapes = _weight_shapes(config, stage)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _two_steps(config, stage, shapes, torch.device("cpu"), _Counted(), check=False)


def measure_stage(config: RunConfig, stage: Stage, device: torch.device | str) -> PeakEstimate:
    """The same on real tensors, with constant weights and random tokens.

    On a CPU counted as in the simulation. On CUDA the allocator's own peak, one term of kind ``allocated``.
    """
    device = torch.device(device)
    gauge: _Gauge = _Allocated(device) if device.type == "cuda" else _Counted()
    return _two_steps(config, stage, _weight_shapes(config, stage), device, gauge)


class _Gauge(Protocol):
    """Something that knows the highest bytes since ``reset``, by kind."""

    def watch(self, model: nn.Module, optimizer: AdamW) -> None: ...
    def reset(self) -> None: ...
    def peak(self) -> dict[str, int]: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: object) -> None: ...


class _Counted(ByteCounter):
    def watch(self, model: nn.Module, optimizer: AdamW) -> None:
        for parameter in model.parameters():
            self.track(parameter, "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        for states in optimizer.state_tensors().values():
            for state in states.values():
                self.track(state, "optimizer")

    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.track(parameter.grad, "gradients")

    def reset(self) -> None:
        self.reset_peak()

    def peak(self) -> dict[str, int]:
        return self.peak_by_label


class _Allocated:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def watch(self, model: nn.Module, optimizer: AdamW) -> None:
        """Nothing to do: the allocator sees all."""

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, int]:
        return {"allocated": torch.cuda.max_memory_allocated(self.device)}

    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...


def _two_steps(
    config: RunConfig,
    stage: Stage,
    shapes: dict[str, torch.Size],
    device: torch.device,
    gauge: _Gauge,
    *,
    check: bool = True,
) -> PeakEstimate:
    highest: dict[str, dict[str, int]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        gauge.reset()
        yield
        highest[name] = max(gauge.peak(), highest.get(name, {}), key=_on_device)

    with gauge:
        model, optimizer = assemble(config, stage, _constant_start(config, stage, shapes), device, check=check)
        gauge.watch(model, optimizer)
        with part(AT_REST):
            pass
        for _ in range(NUM_STEPS):
            # The second micro-batch meets the gradients of the first; later ones hold the same.
            for _ in range(min(2, config.train.gradient_accumulation_steps)):
                with part(FORWARD):
                    inputs, loss = _forward(config, model, device)
                with part(BACKWARD):
                    loss.backward()
                del inputs, loss
            with part(STEP):
                global_grad_norm(optimizer.parameters.values())
                # A half stands for any clip coefficient: to scale a gradient may take memory.
                optimizer.step(config.learning_rate(stage.index), 1.0 if config.optim.max_grad_norm is None else 0.5)
                optimizer.zero_grad()
    return PeakEstimate(tuple(Instant(name, _estimate(by_kind)) for name, by_kind in highest.items()))


def _forward(config: RunConfig, model: PreTrainedModel, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inputs of a micro-batch, which live until its backward pass is done, and its loss."""
    train = config.train
    shape = (train.per_device_train_batch_size, train.sequence_length)
    input_ids = torch.randint(config.model.vocab_size, shape, device=device)
    labels = torch.randint(config.model.vocab_size, shape, device=device)
    positions = None
    if config.data.within_documents:
        positions = torch.arange(train.sequence_length, device=device).expand(shape).contiguous()
    loss = batch_loss(
        model, input_ids, labels, positions, num_valid=labels.numel(), chunk_size=train.loss_chunk_size
    )
    return (input_ids, labels), loss


def _weight_shapes(config: RunConfig, stage: Stage) -> dict[str, torch.Size]:
    with FakeTensorMode():
        state = initial_state(_hf_config(config, stage), seed=0, dtype=torch.float32)
    return {name: weight.shape for name, weight in state.items()}


def _hf_config(config: RunConfig, stage: Stage) -> PretrainedConfig:
    return hf_config(config.model.hf_config(), stage.num_hidden_layers)


def _constant_start(config: RunConfig, stage: Stage, shapes: dict[str, torch.Size]) -> StageStart:
    dtype = DTYPES[config.train.precision]
    weights = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}
    return StageStart(_hf_config(config, stage), weights, (), TrainState(stage.index, 0, 0, 0))


def _on_device(by_kind: dict[str, int]) -> int:
    return sum(num_bytes for kind, num_bytes in by_kind.items() if kind != HOST)


def _estimate(by_kind: dict[str, int]) -> MemoryEstimate:
    return MemoryEstimate(tuple(MemoryTerm("model", kind, num_bytes, "counted") for kind, num_bytes in by_kind.items()))
