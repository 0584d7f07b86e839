"""How long a step of a phase takes on a device: the work of each kind, divided by the device's speed at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from steplm.config import RunConfig
from steplm.cost.work import Work, step_work
from steplm.schedule import Phase
from steplm.types import ModelShape

HOST_UPDATE = 20e9  # bytes a second that an update in host memory reads and writes; assumed
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
