"""Runs that begin alike train their common stages once: the others branch off from the stage's end.

Two runs with the same key of a stage's end have the same checkpoint there, to the last bit. Keys cover all
stages up to theirs, so that runs share a number of first stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Run = TypeVar("Run")


@dataclass(frozen=True)
class Start(Generic[Run]):
    """A run that may start now, and the run and stage that it branches off from."""

    run: Run
    source: Run | None = None
    stage_index: int = 0


def num_shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Stages, from the first, that two runs have in common."""
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
    """The first waiting run that need not wait for a stage that a running one is about to finish.

    Args:
        keys: of the ends of each run's stages.
        stage_ends: the stages of each run whose ends are on the disk; runs without one may be left out.
        begun: runs that have checkpoints of their own, and go on from them.
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
    """Whether a run that is still to come could branch off from this one."""
    return any(num_shared(keys[run], keys[other]) for other in still_to_come if other != run)
