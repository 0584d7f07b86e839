"""Whether a growth operator leaves a model's function as it is, tried on a small model of the same layers."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from steplm.errors import GrowthError
from steplm.growth.grow import grow
from steplm.growth.operators import OPERATORS
from steplm.models.build import build_model, grown_config, initial_state, with_layers
from steplm.types import LayerMap, LayerOrigin

VOCAB_SIZE = 16
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# A new layer between two old ones: it copies the lower one, and the upper one moves up.
BETWEEN = LayerMap((LayerOrigin((0,)), LayerOrigin((0, 1), is_new=True, fraction=0.5), LayerOrigin((1,))))


@torch.no_grad()
def require_unchanged_function(config: PretrainedConfig, operator: str) -> None:
    """Grow two layers of this configuration to three, and compare every logit.

    Their weights and biases are random: ones and zeros of a fresh model would hide what is added. Operators that do
    not declare that they preserve the function are not tried.

    Raises:
        GrowthError: the operator declares it, and the logits change.
    """
    if not OPERATORS[operator].function_preserving:
        return
    small = with_layers(config, [0, config.num_hidden_layers - 1])
    small.vocab_size = VOCAB_SIZE
    for key in SPECIAL_TOKENS:
        setattr(small, key, 0)
    state = initial_state(small, seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.1)
    tokens = torch.arange(VOCAB_SIZE).view(2, -1)
    before = build_model(small, state).eval()(tokens, use_cache=False).logits
    grown = grow(state, BETWEEN, operator)
    after = build_model(grown_config(small, BETWEEN), grown).eval()(tokens, use_cache=False).logits
    if not torch.equal(before, after):
        raise GrowthError(
            f"operator {operator!r} would change what a {config.model_type!r} model computes: its layers do more than "
            "add to the residual stream by output projections that can be set to zero, or depend on how deep they "
            "stand. Use another growth operator.",
            model_type=config.model_type,
            operator=operator,
        )
