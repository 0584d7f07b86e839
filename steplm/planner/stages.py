"""The cost of a stage for any number of new and old layers, from which the plan chooses the layers of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property, partial

from steplm.config import RunConfig
from steplm.cost.price import Cost, price
from steplm.cost.seconds import Speeds, step_seconds
from steplm.cost.terms import check_shards, model_state
from steplm.planner.checks import Run, check_options
from steplm.planner.methods import METHODS, Draft, Parts, check_keys
from steplm.planner.solve import new_and_old, peak_cost
from steplm.planner.tokens import StageTokens, stage_tokens
from steplm.schedule import Phase
from steplm.types import ModelShape


class StagePrices:
    """Costs of a stage that adds ``num_new`` layers to ``num_old`` existing ones, over all of its phases.

    Raises:
        ConfigError: the configuration is not a valid run; see ``check_keys``, ``check_options`` and ``check_shards``.
    """

    def __init__(self, config: RunConfig, shape: ModelShape) -> None:
        self.config, self.shape = config, shape
        self.method, self.parts = METHODS[config.method], Parts(config, shape)
        self.device_bytes, self.objective_bytes = cache(self._device_bytes), cache(self._objective_bytes)
        self.cost, self.drafts = cache(partial(price, config, shape)), cache(self._drafts)
        check_keys(config)
        check_options(self.run)
        for draft in self.run.drafts:
            check_shards(config, shape, draft.phase)

    @cached_property
    def run(self) -> Run:
        """Every kind of phase: those of a first stage with two layers, and of a stage that grows from one to two."""
        later = self.drafts(1, 1) if self.config.plan.num_stages > 1 else ()
        return Run(self.config, (*self.drafts(2, 0), *later))

    @cached_property
    def old_layers_take_less(self) -> bool:
        """Whether an old layer takes less memory than a new one."""
        if not self.method.grows or self.config.plan.num_stages == 1:
            return False
        one_old, none_old = (
            max(self._state_bytes(draft, count_outer=False) for draft in self.drafts(num_new, 2 - num_new))
            for num_new in (1, 2)
        )
        return one_old < none_old

    def _drafts(self, num_new: int, num_old: int, num_steps: int | None = None) -> tuple[Draft, ...]:
        """The phases of a stage."""
        if self.config.plan.num_stages == 1:  # a single stage has no old layers, whatever the caller passes
            num_new, num_old = num_new + num_old, 0
        return tuple(self.method.phases(self.parts, num_new, num_old, num_steps))

    def mean_flops_per_token(self, num_new: int, num_old: int, *, recomputed: bool = False) -> int:
        """Mean training FLOPs per token over the phases of a stage, optionally with recomputed activations."""
        costs = [(draft.steps, self.cost_of_draft(draft)) for draft in self.drafts(num_new, num_old)]
        return round(
            sum(steps * (cost.flops_per_token + recomputed * cost.recomputed_flops_per_token) for steps, cost in costs)
        )

    def mean_step_seconds(self, num_new: int, num_old: int, speeds: Speeds) -> float:
        """Mean seconds per step over the phases of a stage, for families with activation formulas only."""
        total = 0.0
        for draft in self.drafts(num_new, num_old):
            step = step_seconds(self.config, self.shape, draft.phase, speeds)
            assert step is not None  # None only for families whose peak is unknown too
            total += draft.steps * step.total
        return total

    def tokens(self, layers: Sequence[int]) -> list[StageTokens]:
        """The tokens of every stage, given the layers that each adds.

        Raises:
            ConfigError: the budget is less than one step per stage.
        """
        return stage_tokens(
            self.config.plan,
            layers,
            step_tokens=self.config.step_tokens,
            num_parameters=self.shape.num_parameters(sum(layers)),
            flops_per_token=[self.mean_flops_per_token(*stage) for stage in new_and_old(layers)],
        )

    def preferred(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Stages of equal size where nothing favors ``layers``, which a solver found: neither memory nor the peak.

        Without freezing, the last stage trains the whole model. All plans then usually have the same peak, and equal
        stages are the natural choice.
        """
        if self.old_layers_take_less:
            return layers
        smaller, remainder = divmod(sum(layers), len(layers))
        equal_parts = tuple(smaller + (stage < remainder) for stage in range(len(layers)))
        cost = self.objective_bytes
        return equal_parts if peak_cost(cost, equal_parts) <= peak_cost(cost, layers) else layers

    def model_state_bytes(self, num_new: int, num_old: int) -> int:
        """The largest model state of any phase."""
        return max(
            self._state_bytes(draft, count_outer=self.config.plan.count_embeddings)
            for draft in self.drafts(num_new, num_old)
        )

    def _device_bytes(self, num_new: int, num_old: int) -> int:
        """The peak, or the model state for families without activation formulas."""
        return max(self.cost_of_draft(draft).device_bytes for draft in self.drafts(num_new, num_old))

    def host_bytes(self, num_new: int, num_old: int) -> int:
        """Peak host memory."""
        return max(self.cost_of_draft(draft).host_bytes for draft in self.drafts(num_new, num_old))

    def _objective_bytes(self, num_new: int, num_old: int) -> int:
        """What the division into stages minimizes, as ``plan.objective`` says."""
        if self.config.plan.objective == "peak":
            return self.device_bytes(num_new, num_old)
        return self.model_state_bytes(num_new, num_old)

    def cost_of_draft(self, draft: Draft) -> Cost:
        return self.cost(draft.phase)

    def _state_bytes(self, draft: Draft, *, count_outer: bool) -> int:
        """The model state alone, which takes less time than the whole cost."""
        return model_state(self.config, self.shape, draft.phase, count_outer=count_outer).total_bytes

    def cost_of_phase(self, phase: Phase) -> Cost:
        """The cost of a phase; phases that differ only in tokens and position share one object."""
        return self.cost(replace(phase, index=0, stage=0, tokens=0, scheduled_tokens=0, schedule_start_tokens=0))
