"""The steps and the growth of a real stage, run to see what they hold: on fake tensors, in seconds, or on real ones.

Fake tensors have a shape, a device and no data. They run the code that training runs, so that all it allocates is
counted; not seen are the insides of kernels, and the device's context, libraries and fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from steplm.config import RunConfig
from steplm.distributed.world import World
from steplm.models.build import DTYPES, hf_config, initial_state
from steplm.models.forward import batch_loss
from steplm.optim.adamw import global_grad_norm
from steplm.training.assemble import StageStart, assemble, probe_model
from steplm.training.peak_meter import ALLOCATED, AllocatedBytes, CountedBytes, gauge_for
from steplm.training.timeline import GROWN_WEIGHTS, STAGE_WEIGHTS, Part, RecordedBytes, on_device
from steplm.types import Instant, MemoryEstimate, MemoryTerm, PeakEstimate, Stage, TrainState

AT_REST, FORWARD, BACKWARD, STEP, GROWTH = "between steps", "forward", "backward", "optimizer step", "growth"
ASSEMBLY = "assembly"
LIBRARIES = "libraries"  # kind of term

CPU = torch.device("cpu")

T = TypeVar("T")


def simulate_stage(config: RunConfig, stage: Stage) -> PeakEstimate:
    """What the device would hold at most in each part of a stage's step, counted on fake tensors.

    The instants are ``AT_REST``, ``FORWARD``, ``BACKWARD`` and, unless the update is part of that, ``STEP``. The
    kinds of their terms are ``weights``, ``gradients``, ``optimizer``, ``rest`` (activations and workspace) and
    ``host``. A compiled model is counted as if it were not.
    """
    config = _without_compile(config)
    return _simulated(config, stage, lambda shapes: _steps(config, stage, shapes, CountedBytes(), check=False))


def measure_stage(config: RunConfig, stage: Stage, device: torch.device | str) -> PeakEstimate:
    """The same on real tensors, with constant weights and random tokens.

    On a CPU counted as in the simulation. On CUDA the allocator's own peak: a term of kind ``allocated`` and, of the
    instants in a step, one of kind ``libraries``, the workspaces of cuBLAS, which no plan counts.
    """
    device = torch.device(device)
    return _steps(config, stage, _weight_shapes(config, stage), gauge_for(device), device)


def simulate_timeline(config: RunConfig, stage: Stage) -> list[Part]:
    """The course of a stage, counted on fake tensors: the growth, if there is one, the assembly and two steps.

    The first step has one micro-batch, the second two where steps of this run have more than one.
    """
    config = _without_compile(config)
    return _simulated(config, stage, lambda shapes: _timeline(config, stage, shapes, check=False))


def measure_timeline(config: RunConfig, stage: Stage) -> list[Part]:
    """The same on real tensors, on the CPU."""
    return _timeline(config, stage, _weight_shapes(config, stage), check=True)


def simulate_growth(config: RunConfig, stage: Stage) -> PeakEstimate:
    """What the device would hold at most when this stage is entered: the grown model's loss, of plain weights.

    Merge and growth themselves act in the host's memory, and the model before them is smaller.
    """
    return _simulated(config, stage, lambda shapes: _growth(config, stage, shapes, CountedBytes()))


def _simulated(config: RunConfig, stage: Stage, run: Callable[[dict[str, torch.Size]], T]) -> T:
    shapes = _weight_shapes(config, stage)
    with FakeTensorMode(), _unpacked_sequences(config):
        return run(shapes)


def _timeline(config: RunConfig, stage: Stage, shapes: dict[str, torch.Size], *, check: bool) -> list[Part]:
    growth, steps = RecordedBytes(), RecordedBytes()
    if stage.layer_map is not None:
        _growth(config, stage, shapes, growth, growth.start)
    _steps(config, stage, shapes, steps, check=check, on_part=steps.start)
    return growth.parts() + steps.parts()


def _growth(
    config: RunConfig,
    stage: Stage,
    shapes: dict[str, torch.Size],
    counter: CountedBytes,
    on_part: Callable[[str], None] = lambda name: None,
) -> PeakEstimate:
    with counter:
        on_part(GROWN_WEIGHTS)
        start = _constant_start(config, stage, shapes)
        model = probe_model(config, start.hf_config, start.weights, World(CPU))
        start.forget_tensors()
        counter.watch(model)
        on_part(GROWTH)
        counter.reset()
        batch_size = config.eval_batch_size
        with torch.no_grad():
            _forward(config, model.eval(), CPU, batch_size)
        return PeakEstimate((Instant(GROWTH, _estimate(counter.peak())),))


def _steps(
    config: RunConfig,
    stage: Stage,
    shapes: dict[str, torch.Size],
    gauge: CountedBytes | AllocatedBytes,
    device: torch.device = CPU,
    *,
    check: bool = True,
    on_part: Callable[[str], None] = lambda name: None,
) -> PeakEstimate:
    """A step of one micro-batch and, where a step has more, a second one of two."""
    highest: dict[str, dict[str, int]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        on_part(name)
        gauge.reset()
        yield
        highest[name] = max(gauge.peak(), highest.get(name, {}), key=on_device)

    fused, learning_rate = config.memory.fused_backward, config.learning_rate(stage.num_growths)
    # A half stands for any clip coefficient: to scale a gradient may take memory.
    grad_scale = 1.0 if config.optim.max_grad_norm is None else 0.5
    with gauge:
        on_part(STAGE_WEIGHTS)
        start = _constant_start(config, stage, shapes)
        on_part(ASSEMBLY)
        assembled = assemble(config, stage, start, World(device), check=check)
        start.forget_tensors()
        model, optimizer = assembled.model, assembled.optimizer
        gauge.watch(model, optimizer)
        with part(AT_REST):
            pass
        # The second step meets what the first has left behind, the second micro-batch the gradients of the first.
        for num_micro_batches in (1, min(2, config.micro_batches)):
            for _ in range(num_micro_batches):
                with part(FORWARD):
                    inputs, loss = _forward(config, model, device)
                with part(BACKWARD), optimizer.in_backward(learning_rate) if fused else nullcontext():
                    loss.backward()
                del inputs, loss
            if not fused:
                with part(STEP):
                    global_grad_norm(optimizer.parameters.values())
                    optimizer.step(learning_rate, grad_scale)
                    optimizer.zero_grad()
        libraries = gauge.library_bytes()
    for name, by_kind in highest.items():
        if libraries and name != AT_REST:
            by_kind |= {ALLOCATED: by_kind[ALLOCATED] - libraries, LIBRARIES: libraries}
    return PeakEstimate(tuple(Instant(name, _estimate(by_kind)) for name, by_kind in highest.items()))


def _forward(
    config: RunConfig, model: PreTrainedModel, device: torch.device, batch_size: int | None = None
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The inputs of a micro-batch, which live until its backward pass is done, and its loss."""
    sequence_length = config.train.sequence_length
    shape = (batch_size or config.micro_batch_size, sequence_length)
    input_ids = torch.randint(config.model.vocab_size, shape, device=device)
    labels = torch.randint(config.model.vocab_size, shape, device=device)
    positions = None
    if config.data.within_documents:  # two documents in each sequence
        positions = (torch.arange(sequence_length, device=device) % (sequence_length // 2 + 1)).repeat(shape[0], 1)
    loss = batch_loss(
        model,
        input_ids,
        labels,
        positions,
        num_valid=labels.numel(),
        chunk_size=config.train.loss_chunk_size,
        offload_activations=config.memory.offload_activations,
    )
    return (input_ids, labels, positions), loss


@contextmanager
def _unpacked_sequences(config: RunConfig) -> Iterator[None]:
    """Inside, ``transformers`` takes each sequence for one document, if the configuration does.

    It looks for packed documents in the positions' values, which fake positions do not have, and so would always
    make masks of sequence times sequence, though training never sees them.
    """
    found = masking_utils.find_packed_sequence_indices
    if not config.data.within_documents:
        masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def _without_compile(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})


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


def _estimate(by_kind: dict[str, int]) -> MemoryEstimate:
    return MemoryEstimate(tuple(MemoryTerm("model", kind, num_bytes, "counted") for kind, num_bytes in by_kind.items()))
