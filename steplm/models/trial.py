"""Test a model family on a small model of its layers: whether it can be trained, and growth preserves its function."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from steplm.errors import GrowthError
from steplm.growth.grow import grow
from steplm.growth.operators import OPERATORS
from steplm.models.build import TINY_VOCABULARY, build_model, grown_config, initial_state, with_tiny_vocabulary
from steplm.models.forward import check_loss, running
from steplm.types import LayerMap, LayerOrigin

# A new layer between two old ones; it is a copy of the lower one, and the upper one moves up.
BETWEEN = LayerMap((LayerOrigin((0,)), LayerOrigin((0, 1), is_new=True, fraction=0.5), LayerOrigin((1,))))


def require_trainable(config: PretrainedConfig) -> None:
    """Require that the model is causal and that training computes its loss correctly.

    Raises:
        ConfigError: as ``check_loss``.
    """
    small, state = _two_layers(config)
    check_loss(build_model(small, state), TINY_VOCABULARY)


@torch.no_grad()
def require_unchanged_function(config: PretrainedConfig, operator: str) -> None:
    """Grow two layers of this configuration to three, and require identical logits.

    Only operators that declare themselves function-preserving are tested.

    Raises:
        GrowthError: the logits change.
        ConfigError: the model cannot be run.
    """
    if not OPERATORS[operator].function_preserving:
        return
    small, state = _two_layers(config)
    grown = grow(state, BETWEEN, operator)
    tokens = torch.arange(TINY_VOCABULARY).view(2, -1)
    models = [build_model(small, state).eval(), build_model(grown_config(small, BETWEEN), grown).eval()]
    with running(models[0]):
        before, after = (model(tokens, use_cache=False).logits for model in models)
    if not torch.equal(before, after):
        raise GrowthError(
            f"operator {operator!r} would change what a {config.model_type!r} model computes: its layers do more than "
            "add to the residual stream by output projections that can be set to zero, or depend on how deep they "
            "stand. Use another growth operator.",
            model_type=config.model_type,
            operator=operator,
        )


def _two_layers(config: PretrainedConfig) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Config and weights of the bottom and top layers, with added noise because ones and zeros would hide changes."""
    small = with_tiny_vocabulary(config, [0, config.num_hidden_layers - 1])
    state = initial_state(small, seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.1)
    return small, state
