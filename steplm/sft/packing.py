"""Checks that a model does not attend across records packed into one sequence."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from steplm.errors import ConfigError
from steplm.models.forward import evaluating


def check_packing(model: PreTrainedModel, length: int = 8) -> None:
    """Compare a record's logits alone and packed behind another one, separated by position IDs as in ``trl``.

    ``transformers`` turns such position IDs into a block-diagonal mask for eager attention and SDPA, and gives the
    lengths to flash attention. A model family may not do so, and then every record would attend to those before it.

    Raises:
        ConfigError: the other record affects the logits.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(2 * length, device=model.device) * 7919 % vocab_size).unsqueeze(0)
    positions = torch.arange(length, device=model.device).repeat(2).unsqueeze(0)
    with evaluating(model):
        alone = model(input_ids=ids[:, length:], use_cache=False).logits.float()
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, length:].float()
    spread = float(alone.max() - alone.min())
    difference = float((packed - alone).abs().max())
    if not difference <= (1e-4 if model.dtype == torch.float32 else 5e-2) * spread + 1e-6:  # not ">", which NaN passes
        raise ConfigError(
            f"packing=true would let records attend to each other: in {type(model).__name__} the logits of a record "
            f"change by {difference:.3g} (of a spread of {spread:.3g}) when another precedes it. Set packing=false.",
            difference=difference,
        )
