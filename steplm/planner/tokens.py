"""How many tokens each stage sees: from tokens per stage, a total, tokens per parameter, or FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from steplm.config import PlanConfig
from steplm.errors import ConfigError

DEFAULT_TOKENS_PER_PARAMETER = 20.0  # Hoffmann et al. (arXiv 2203.15556)


@dataclass(frozen=True)
class StageTokens:
    """The tokens of a stage, in whole optimizer steps."""

    scheduled: int  # the learning-rate schedule runs over these
    trained: int  # the stage stops after these


def stage_tokens(
    config: PlanConfig,
    layers: Sequence[int],
    *,
    step_tokens: int,
    num_parameters: int,
    flops_per_token: Sequence[int],
) -> list[StageTokens]:
    """Compute the tokens of every stage.

    A total budget is the sum of the *trained* tokens of all stages, rounded to whole steps; the last stage
    takes the remainder. Every stage has at least one step. All stages but the last stop at the fraction
    ``grow_at`` of their schedule, so the schedule is longer by a factor of ``1 / grow_at``.

    Args:
        layers: n_1 … n_K.
        step_tokens: tokens per optimizer step.
        num_parameters: parameters of the final model, for a budget in tokens per parameter.
        flops_per_token: training FLOPs per token of each stage, for a budget in FLOPs.

    Raises:
        ConfigError: the budget is less than one step per stage.
    """
    if config.tokens_per_stage is not None:
        total: float = sum(config.tokens_per_stage)
        least, each = f"a stage of {min(config.tokens_per_stage):,} tokens is", ""
        steps = [round(tokens / step_tokens) for tokens in config.tokens_per_stage]
    else:
        shares = _shares(config, layers)
        total = _total_tokens(config, shares, num_parameters, flops_per_token)
        least, each = f"the budget of {total:,.0f} tokens is", f" for each of {len(layers)} stages"
        steps = divide(round(total / step_tokens), shares)
    if min(steps) < 1:
        raise ConfigError(
            f"{least} less than one optimizer step ({step_tokens:,} tokens){each}. Raise the budget, or lower "
            "train.sequence_length, train.per_device_train_batch_size, train.gradient_accumulation_steps or "
            "train.global_batch_size.",
            total_tokens=total,
            step_tokens=step_tokens,
        )
    scheduled = [*(max(n, round(n / config.grow_at)) for n in steps[:-1]), steps[-1]]
    return [StageTokens(s * step_tokens, n * step_tokens) for s, n in zip(scheduled, steps, strict=True)]


def _shares(config: PlanConfig, layers: Sequence[int]) -> list[float]:
    """Each stage's share of the trained tokens; the shares sum to 1."""
    weights: list[float]
    if config.token_shares == "layers":
        weights = [float(depth) for depth in accumulate(layers)]
    elif config.token_shares == "equal":
        weights = [1.0] * len(layers)
    else:
        weights = list(config.token_shares)
    return [weight / sum(weights) for weight in weights]


def _total_tokens(
    config: PlanConfig, shares: Sequence[float], num_parameters: int, flops_per_token: Sequence[int]
) -> float:
    if config.total_tokens is not None:
        return config.total_tokens
    if config.total_flops is not None:
        return config.total_flops / sum(share * flops for share, flops in zip(shares, flops_per_token, strict=True))
    return num_parameters * (config.tokens_per_parameter or DEFAULT_TOKENS_PER_PARAMETER)


def divide(num_steps: int, shares: Sequence[float]) -> list[int]:
    """Divide whole steps by share, at least one each if there are enough; the last stage takes the rest."""
    steps: list[int] = []
    for index, share in enumerate(shares[:-1]):
        kept_for_later = len(shares) - 1 - index
        steps.append(min(max(1, round(num_steps * share)), num_steps - sum(steps) - kept_for_later))
    return [*steps, num_steps - sum(steps)]
