"""Run the steps and growth of a phase to count their memory: on fake tensors, in seconds, or on real tensors.

Fake tensors have a shape and a device but no data. They go through the same code as training, so every tensor that
training allocates is counted. Excluded are kernel-internal workspace, the device context, libraries, and fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from steplm.config import RunConfig
from steplm.distributed.world import World
from steplm.models.build import DTYPES, hf_config, meta_model, plain_state
from steplm.models.forward import batch_loss
from steplm.models.shape import shape_of
from steplm.schedule import Phase
from steplm.training.assemble import PhaseStart, assemble, probe_model
from steplm.training.peak_meter import ALLOCATED, AllocatedBytes, CountedBytes, peak_meter_for
from steplm.training.timeline import GROWN_WEIGHTS, STAGE_WEIGHTS, Part, RecordedBytes, on_device
from steplm.types import Instant, MemoryEstimate, MemoryTerm, PeakEstimate, TrainState

AT_REST, FORWARD, BACKWARD, STEP, GROWTH = "between steps", "forward", "backward", "optimizer step", "growth"
ASSEMBLY = "assembly"
LIBRARIES = "libraries"  # kind of term

CPU = torch.device("cpu")


def simulate_phase(config: RunConfig, phase: Phase) -> PeakEstimate:
    """Peak device memory in each part of a phase's step, counted on fake tensors.

    The instants are ``AT_REST``, ``FORWARD``, ``BACKWARD`` and, unless the update is fused into backward, ``STEP``.
    The kinds of their terms are ``weights``, ``gradients``, ``optimizer``, ``rest`` (activations and workspace) and
    ``host``. ``train.compile`` is ignored.
    """
    with _fake_tensors(config):
        return _steps(_without_compile(config), phase, CountedBytes(), check=False)


def measure_phase(config: RunConfig, phase: Phase, device: torch.device | str) -> PeakEstimate:
    """Like ``simulate_phase``, but on real tensors, with constant weights and random tokens.

    On a CPU, tensors are counted as in the simulation. On CUDA, the peak is the allocator's: a term of kind
    ``allocated`` and, for the instants within a step, one of kind ``libraries`` for the cuBLAS workspaces, which no
    plan counts.
    """
    device = torch.device(device)
    return _steps(config, phase, peak_meter_for(device), device)


def simulate_timeline(config: RunConfig, phase: Phase) -> list[Part]:
    """Memory over the course of a phase, counted on fake tensors: growth (if any), assembly, and two steps.

    The first step has one micro-batch; the second has two if the run's steps have more than one.
    """
    with _fake_tensors(config):
        return _timeline(_without_compile(config), phase, check=False)


def measure_timeline(config: RunConfig, phase: Phase) -> list[Part]:
    """Like ``simulate_timeline``, but on real tensors on the CPU."""
    return _timeline(config, phase, check=True)


def simulate_growth(config: RunConfig, phase: Phase) -> PeakEstimate:
    """Peak device memory on entering this phase, reached when the loss of the grown model's plain weights is computed.

    Merge and growth themselves run in host memory, and the model before them is smaller.
    """
    with _fake_tensors(config):
        return _growth(config, phase, CountedBytes())


def _timeline(config: RunConfig, phase: Phase, *, check: bool) -> list[Part]:
    growth, steps = RecordedBytes(), RecordedBytes()
    if phase.entry.kind in ("grow", "merge"):
        _growth(config, phase, growth)
    _steps(config, phase, steps, check=check)
    return growth.parts() + steps.parts()


def _growth(config: RunConfig, phase: Phase, counter: CountedBytes) -> PeakEstimate:
    shapes = _weight_shapes(config, phase)
    with counter:
        counter.start(GROWN_WEIGHTS)
        start = _constant_start(config, phase, shapes)
        model = probe_model(config, start.hf_config, start.weights, World(CPU))
        start.forget_tensors()
        counter.watch(model)
        counter.start(GROWTH)
        with torch.no_grad():
            _forward(config, model.eval(), CPU, config.eval_batch_size)
        return PeakEstimate((Instant(GROWTH, _estimate(counter.peak())),))


def _steps(
    config: RunConfig,
    phase: Phase,
    meter: CountedBytes | AllocatedBytes,
    device: torch.device = CPU,
    *,
    check: bool = True,
) -> PeakEstimate:
    """Run two steps: the first of one micro-batch, the second of two if the run's steps have that many."""
    highest: dict[str, dict[str, int]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        meter.start(name)
        yield
        highest[name] = max(meter.peak(), highest.get(name, {}), key=on_device)

    fused, learning_rate = config.memory.fused_backward, config.learning_rate(phase.stage)
    # 0.5 stands in for any clip coefficient: scaling gradients may allocate memory.
    grad_scale = 1.0 if config.optim.max_grad_norm is None else 0.5
    shapes = _weight_shapes(config, phase)
    with meter:
        meter.start(STAGE_WEIGHTS)
        start = _constant_start(config, phase, shapes)
        meter.start(ASSEMBLY)
        assembled = assemble(config, shape_of(config.model.hf_config()), phase, start, World(device), check=check)
        start.forget_tensors()
        model, rules = assembled.model, assembled.rules
        meter.watch(model, rules)
        with part(AT_REST):
            pass
        # The second step includes what the first leaves allocated, the second micro-batch the gradients of the first.
        for num_micro_batches in (1, min(2, config.micro_batches)):
            for number in range(1, num_micro_batches + 1):
                updates = fused and number == num_micro_batches
                with part(FORWARD):
                    inputs, loss = _forward(config, model, device)
                with part(BACKWARD), rules.in_backward(learning_rate) if updates else nullcontext():
                    loss.backward()
                del inputs, loss
            if not fused:
                with part(STEP), meter.on_host() if rules.host is not None else nullcontext():
                    rules.grad_norm()
                    rules.step(learning_rate, grad_scale)
                    rules.zero_grad()
        libraries = meter.library_bytes()
    for name, by_kind in highest.items():
        if libraries and name != AT_REST:
            by_kind |= {ALLOCATED: by_kind[ALLOCATED] - libraries, LIBRARIES: libraries}
    return PeakEstimate(tuple(Instant(name, _estimate(by_kind)) for name, by_kind in highest.items()))


def _forward(
    config: RunConfig, model: PreTrainedModel, device: torch.device, batch_size: int | None = None
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Return the inputs of a micro-batch, which must stay alive until its backward pass is done, and its loss."""
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
def _fake_tensors(config: RunConfig) -> Iterator[None]:
    """Create fake tensors, and make ``transformers`` treat each sequence as one document unless the config does not.

    It detects packed documents from the values of the position IDs. Fake tensors have no values, so it would always
    build full sequence-by-sequence masks, which training never allocates.
    """
    found = masking_utils.find_packed_sequence_indices
    if not config.data.within_documents:
        masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        with FakeTensorMode():
            yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def _without_compile(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})


def _weight_shapes(config: RunConfig, phase: Phase) -> dict[str, torch.Size]:
    with unset_fake_temporarily():
        return {name: weight.shape for name, weight in plain_state(meta_model(_hf_config(config, phase))).items()}


def _hf_config(config: RunConfig, phase: Phase) -> PretrainedConfig:
    with unset_fake_temporarily():  # hf_config compares two models on the meta device, whose tensors are not fake
        return hf_config(config.model.hf_config(), phase.num_hidden_layers)


def _constant_start(config: RunConfig, phase: Phase, shapes: dict[str, torch.Size]) -> PhaseStart:
    dtype = DTYPES[config.train.precision]
    weights = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}
    return PhaseStart(_hf_config(config, phase), weights, (), TrainState(phase.stage, phase.index, 0, 0, 0))


def _estimate(by_kind: dict[str, int]) -> MemoryEstimate:
    return MemoryEstimate(tuple(MemoryTerm("model", kind, num_bytes, "counted") for kind, num_bytes in by_kind.items()))
