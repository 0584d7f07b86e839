"""The optimizer that a configuration names. To add one: write its class and add a line to ``OPTIMIZERS``.

The bytes of its states are a term of the plan: ``steplm.memory.terms.optimizer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from steplm.config import RunConfig
from steplm.optim.adamw import AdamW
from steplm.optim.block import BlockAdamW


def _adamw(config: RunConfig, layer_prefix: str, step: int) -> Callable[..., Any]:
    return partial(AdamW, states=config.memory.optimizer_states)


def _badam(config: RunConfig, layer_prefix: str, step: int) -> Callable[..., Any]:
    return partial(
        BlockAdamW,
        states=config.memory.optimizer_states,
        layer_prefix=layer_prefix,
        seed=config.seed,
        switch_steps=config.optim.switch_steps,
        step=step,
    )


def _low_rank(config: RunConfig, layer_prefix: str, step: int) -> Callable[..., Any]:
    from steplm.optim.low_rank import LowRankAdamW

    optim = config.optim
    return partial(
        LowRankAdamW,
        method=optim.name,
        rank=optim.rank,
        update_proj_gap=optim.update_proj_gap,
        scale=optim.scale,
        seed=config.seed,
        layer_prefix=layer_prefix,
    )


# Each gives the optimizer's class with the arguments that are its own.
OPTIMIZERS: dict[str, Callable[[RunConfig, str, int], Callable[..., Any]]] = {
    "adamw": _adamw,
    "badam": _badam,
    "galore": _low_rank,
    "apollo": _low_rank,
    "apollo_mini": _low_rank,
}


def build_optimizer(
    config: RunConfig, parameters: Mapping[str, nn.Parameter], *, layer_prefix: str, step: int = 0
) -> Any:
    """The optimizer of a stage, its states allocated; all have the interface of ``AdamW``.

    Args:
        parameters: the trained ones by name.
        layer_prefix: name of the list of layers, such as ``model.layers``.
        step: optimizer steps of the stage that are done.
    """
    optim = config.optim
    make = OPTIMIZERS[optim.name](config, layer_prefix, step)
    return make(
        parameters,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        master_weights=config.memory.master_weights,
    )
