"""How long a step of a phase takes on a device: the work of each kind, divided by the device's speed at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from steplm.config import RunConfig
from steplm.cost.devices import DEVICES
from steplm.cost.work import KINDS, Work, step_work
from steplm.schedule import Phase
from steplm.types import ModelShape

HOST_UPDATE = 20e9  # bytes a second that an update in host memory reads and writes; assumed

# Shares of the published figures, fitted to the 16 stages of results/gpu_step, measured on an H200
# (benchmarks/seconds.py --h200 fits them again). For other devices they are a guess.
PRODUCTS = 0.41
ATTENTION = 0.6  # counted as if the causal mask left nothing out; held at this in the fit
BYTES = 0.49
OPERANDS = 12.0  # nearly all that products read and write is moved while they compute
BUS = 0.8  # assumed
LAUNCHES = 1 / 8e-6  # a second, by the host; assumed: the measured stages do not tell it

UPDATE = "update"  # the part of a step that waits for all the others
HIDDEN = "frozen from host"  # the part that is copied by a stream of its own, on an accelerator


@dataclass(frozen=True)
class Speeds:
    """What a device does in a second, of each kind of work (keys of ``steplm.cost.work.KINDS``)."""

    name: str
    per_second: Mapping[str, float]
    asynchronous: bool  # an accelerator: the host launches its kernels while it computes
    source: str

    def seconds(self, work: Work) -> float:
        return work.amount / self.per_second[work.kind]


@dataclass(frozen=True)
class StepSeconds:
    """The seconds of one step, by part and kind."""

    work: tuple[Work, ...]
    seconds: tuple[float, ...]  # of each
    total: float

    @property
    def waits_for_launches(self) -> bool:
        """Whether the device is faster than the host can launch its kernels."""
        return self.total > 1.001 * sum(
            seconds for work, seconds in zip(self.work, self.seconds, strict=True) if work.kind != "launches"
        )


def step_seconds(config: RunConfig, shape: ModelShape, phase: Phase, speeds: Speeds) -> StepSeconds | None:
    """One optimizer step of a phase; None for families whose layers are not counted. See ``step_work``."""
    work = step_work(config, shape, phase, on_cuda=speeds.asynchronous)
    if work is None:
        return None
    seconds = tuple(map(speeds.seconds, work))
    return StepSeconds(work, seconds, total_seconds(zip(work, seconds, strict=True), speeds.asynchronous))


def total_seconds(timed: Iterable[tuple[Work, float]], asynchronous: bool) -> float:
    """All kinds of work one after the other.

    On an accelerator launches, and the copies of frozen layers from host memory, take place beside the computing, so
    that the longest of the three counts: first of the forward and backward passes, then of the update, which begins
    when the norm of all gradients is known.
    """
    timed = list(timed)
    if not asynchronous:
        return sum(seconds for _, seconds in timed)
    total = 0.0
    for is_update in (False, True):
        of_part = [(work, seconds) for work, seconds in timed if (work.part == UPDATE) is is_update]
        launches = sum(seconds for work, seconds in of_part if work.kind == "launches")
        copies = sum(seconds for work, seconds in of_part if work.part == HIDDEN)
        total += max(launches, copies, sum(seconds for _, seconds in of_part) - launches - copies)
    return total


def published_speeds(name: str) -> Speeds:
    """The speeds of a device of ``DEVICES``, by what was fitted to an H200."""
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
