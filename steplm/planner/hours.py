"""Estimate how long a plan takes on a device, by stage."""

from __future__ import annotations

from dataclasses import dataclass

from steplm.config import RunConfig
from steplm.cost.seconds import Speeds, StepSeconds, step_seconds
from steplm.planner.plan import Plan


@dataclass(frozen=True)
class StageTime:
    """The time of one stage's training steps, excluding evaluation, checkpoints and data loading."""

    index: int
    num_hidden_layers: int
    tokens: int
    num_steps: int
    seconds: float
    longest_step: StepSeconds  # of any phase

    @property
    def step_seconds(self) -> float:
        """Mean seconds per step."""
        return self.seconds / self.num_steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def stage_times(config: RunConfig, plan: Plan, speeds: Speeds) -> tuple[StageTime, ...] | None:
    """The time of every stage; None for families without formulas, see ``steplm.cost.work.step_work``."""
    by_cost: dict[int, StepSeconds] = {}  # phases with the same cost do the same work
    for place, phase in zip(plan.cost_indices, plan.schedule.phases, strict=True):
        step = by_cost.get(place) or step_seconds(config, plan.shape, phase, speeds)
        if step is None:
            return None
        by_cost[place] = step
    times = []
    for stage in plan.stages:
        steps = [
            (phase.tokens // config.step_tokens, by_cost[plan.cost_indices[phase.index - 1]]) for phase in stage.phases
        ]
        times.append(
            StageTime(
                stage.index,
                stage.num_hidden_layers,
                stage.tokens,
                sum(count for count, _ in steps),
                sum(count * step.total for count, step in steps),
                max((step for _, step in steps), key=lambda step: step.total),
            )
        )
    return tuple(times)
