"""Stages that several runs have in common are trained once; the other runs branch off from the end of the stage.

Two runs with the same key for a stage have bit-identical checkpoints at its end. A key covers all stages up to its
own, so what two runs share is always a number of leading stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Run = TypeVar("Run")


@dataclass(frozen=True)
class Start(Generic[Run]):
    """A run that may start now, and the run and stage that it branches off from, if any."""

    run: Run
    source: Run | None = None
    stage_index: int = 0


def num_shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Number of leading stages that two runs have in common."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def next_start(
    waiting: Iterable[Run],
    running: Iterable[Run],
    keys: Mapping[Run, Sequence[str]],
    stage_ends: Mapping[Run, Collection[int]],
    begun: Collection[Run],
) -> Start[Run] | None:
    """The first waiting run that need not wait for a shared stage that a running one is still training.

    Args:
        keys: stage keys of each run.
        stage_ends: stages of each run with a checkpoint at their end; runs without any may be omitted.
        begun: runs that have checkpoints of their own and resume from them.
    """
    running = list(running)
    for run in waiting:
        if run in begun:
            return Start(run)
        at_hand = {
            other: max((stage for stage in ends if stage <= num_shared(keys[run], keys[other])), default=0)
            for other, ends in stage_ends.items()
            if other != run
        }
        source = max(at_hand, key=lambda other: at_hand[other], default=None)
        depth = 0 if source is None else at_hand[source]
        if any(num_shared(keys[run], keys[other]) > depth for other in running):
            continue
        return Start(run, source, depth) if depth else Start(run)
    return None


def is_needed(run: Run, still_to_come: Iterable[Run], keys: Mapping[Run, Sequence[str]]) -> bool:
    """Whether another run, not yet settled, could branch off from this one."""
    return any(num_shared(keys[run], keys[other]) for other in still_to_come if other != run)
