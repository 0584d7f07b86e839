"""The optimizer that a configuration names. To add one: write its class and add a line to ``OPTIMIZERS``.

The bytes of its states are a term of the plan: ``steplm.cost.terms.optimizer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from steplm.config import RunConfig
from steplm.optim.adamw import AdamW
from steplm.optim.block import BlockAdamW
from steplm.optim.low_rank import LowRankAdamW


@dataclass(frozen=True)
class Context:
    """What an optimizer may need to know beside its parameters."""

    config: RunConfig
    layer_prefix: str  # name of the list of layers, such as ``model.layers``
    linears: frozenset[str]  # names, below a layer, of its linear maps
    low_rank_layers: tuple[int, ...]  # those whose linear maps have low-rank states, where the optimizer has such
    step: int  # optimizer steps of the stage that are done


def _adamw(context: Context) -> Callable[..., Any]:
    return partial(AdamW, states=context.config.memory.optimizer_states)


def _badam(context: Context) -> Callable[..., Any]:
    return partial(
        BlockAdamW,
        states=context.config.memory.optimizer_states,
        layer_prefix=context.layer_prefix,
        seed=context.config.seed,
        switch_steps=context.config.optim.switch_steps,
        step=context.step,
    )


def _low_rank(context: Context) -> Callable[..., Any]:
    optim = context.config.optim
    return partial(
        LowRankAdamW,
        method=optim.name,
        rank=optim.rank,
        update_proj_gap=optim.update_proj_gap,
        scale=optim.scale,
        seed=context.config.seed,
        layer_prefix=context.layer_prefix,
        layers=context.low_rank_layers,
        linears=context.linears,
    )


# Each gives the optimizer's class with the arguments that are its own.
OPTIMIZERS: dict[str, Callable[[Context], Callable[..., Any]]] = {
    "adamw": _adamw,
    "badam": _badam,
    "galore": _low_rank,
    "apollo": _low_rank,
    "apollo_mini": _low_rank,
}


def build_optimizer(
    config: RunConfig, model: nn.Module, *, layer_prefix: str, low_rank_layers: tuple[int, ...], step: int = 0
) -> Any:
    """The optimizer of a stage over the trained parameters of ``model``, its states allocated.

    Every one has the interface of ``AdamW``.

    Args:
        layer_prefix: name of the list of layers, such as ``model.layers``.
        low_rank_layers: indices of the layers whose linear maps have low-rank states, for the optimizers that have
            such.
        step: optimizer steps of the stage that are done.
    """
    layers = model.get_submodule(layer_prefix).named_modules()
    linears = frozenset(name.partition(".")[2] for name, module in layers if isinstance(module, nn.Linear))
    make = OPTIMIZERS[config.optim.name](Context(config, layer_prefix, linears, low_rank_layers, step))
    optim = config.optim
    return make(
        {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad},
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        master_weights=config.memory.master_weights,
    )
