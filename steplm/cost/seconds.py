"""Duration of a step of a phase on a device: the work of each kind, divided by the device's speed at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from steplm.config import RunConfig
from steplm.cost.devices import DEVICES
from steplm.cost.work import KINDS, Work, step_work
from steplm.schedule import Phase
from steplm.types import ModelShape

HOST_UPDATE = 20e9  # bytes per second that an update in host memory reads and writes; assumed

# Fractions of the published figures, fitted to the 16 stages in results/gpu_step, which were measured on an H200
# (benchmarks/seconds.py --h200 repeats the fit). For other devices they are a guess.
PRODUCTS = 0.41
ATTENTION = 0.6  # FLOPs are counted as if the causal mask saved nothing; held constant in the fit
BYTES = 0.49
OPERANDS = 12.0  # above 1 because memory traffic of matmuls almost entirely overlaps with their compute
BUS = 0.8  # assumed
LAUNCHES = 1 / 8e-6  # kernel launches per second; assumed, since the measured stages do not determine it

UPDATE = "update"  # the part of a step that starts after all others
HIDDEN = ("frozen from host", "weights from host")  # parts that an accelerator copies on a separate stream


@dataclass(frozen=True)
class Speeds:
    """Work per second of a device, for each kind of work (keys of ``steplm.cost.work.KINDS``)."""

    name: str
    per_second: Mapping[str, float]
    asynchronous: bool  # True for an accelerator, where the host launches kernels while the device computes
    source: str

    def seconds(self, work: Work) -> float:
        return work.amount / self.per_second[work.kind]


@dataclass(frozen=True)
class StepSeconds:
    """Duration of one step, by part and kind of work."""

    work: tuple[Work, ...]
    seconds: tuple[float, ...]  # one for each entry of ``work``
    total: float
    host_update: float  # seconds by which updates in host memory lengthen the step

    def micro_batches_until_host_update_is(self, share: float, micro_batches: int) -> int:
        """Micro-batches per step from which updates in host memory take at most ``share`` of it; 0 if they are hidden.

        The rest of the step grows with ``micro_batches``, the number that it has now.
        """
        of_one = (self.total - self.host_update) / micro_batches
        return ceil(self.host_update * (1 - share) / share / of_one)

    @property
    def waits_for_launches(self) -> bool:
        """Whether the device waits for the host to launch kernels."""
        return self.total > 1.001 * sum(
            seconds for work, seconds in zip(self.work, self.seconds, strict=True) if work.kind != "launches"
        )


def step_seconds(config: RunConfig, shape: ModelShape, phase: Phase, speeds: Speeds) -> StepSeconds | None:
    """Duration of one optimizer step of a phase; None for families that ``step_work`` does not cover."""
    work = step_work(config, shape, phase, on_cuda=speeds.asynchronous)
    if work is None:
        return None
    seconds = tuple(map(speeds.seconds, work))
    timed = list(zip(work, seconds, strict=True))
    updates = sum(part for work, part in timed if work.kind == "host update")
    hidden = 0.0
    if config.memory.delay_update:  # updates in host memory run during the passes of the next step
        passes = [(work, part) for work, part in timed if work.part != UPDATE]
        hidden = min(updates, total_seconds(passes, speeds.asynchronous))
    elif config.memory.fused_backward:  # updates in host memory run during the last micro-batch's backward pass
        backward = sum(part for work, part in timed if work.part in ("layers backward", "recomputation"))
        hidden = min(updates, backward / config.micro_batches)
    return StepSeconds(work, seconds, total_seconds(timed, speeds.asynchronous) - hidden, updates - hidden)


def total_seconds(timed: Iterable[tuple[Work, float]], asynchronous: bool) -> float:
    """Total duration: the sum over all kinds of work, minus what overlaps.

    On an accelerator, kernel launches and copies of layers from host memory overlap with compute, so only the
    longest of the three counts. This applies once to the forward and backward passes, and again to the update, which
    starts when the norm of all gradients is known.
    """
    timed = list(timed)
    if not asynchronous:
        return sum(seconds for _, seconds in timed)
    total = 0.0
    for is_update in (False, True):
        of_part = [(work, seconds) for work, seconds in timed if (work.part == UPDATE) is is_update]
        launches = sum(seconds for work, seconds in of_part if work.kind == "launches")
        copies = sum(seconds for work, seconds in of_part if work.part in HIDDEN)
        total += max(launches, copies, sum(seconds for _, seconds in of_part) - launches - copies)
    return total


def published_speeds(name: str) -> Speeds:
    """Speeds of a device of ``DEVICES``: its published figures times the fractions fitted to an H200."""
    device = DEVICES[name]
    rates = {
        "bf16 products": PRODUCTS * device.bf16_flops,
        "fp32 products": PRODUCTS * device.fp32_flops,
        "bf16 attention": ATTENTION * device.bf16_flops,
        "fp32 attention": ATTENTION * device.fp32_flops,
        "operands": OPERANDS * device.bandwidth,
        "bus": BUS * device.bus,
        "host update": HOST_UPDATE,
        "launches": LAUNCHES,
    }
    per_second = {kind: rates.get(kind, BYTES * device.bandwidth) for kind in KINDS}
    fitted = "shares of its published figures fitted to measured steps"
    guessed = "published figures, at the shares of them that an H200 reached; not measured on this device"
    return Speeds(name, per_second, asynchronous=True, source=fitted if name == "h200" else guessed)
