"""Text generation with ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steplm.data.tokenizer import load_tokenizer
from steplm.errors import ConfigError
from steplm.eval.text import opening_token
from steplm.files import is_unicode
from steplm.models.folder import load_for_inference
from steplm.models.forward import require_known_tokens, running


def generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Continue ``prompt`` and return only the new text; the same seed gives the same text.

    Args:
        folder: a Hugging Face folder or hub model, with its tokenizer.
        prompt: the beginning of a document; may be empty. ``opening_token`` is prepended, as in evaluation.
        temperature: 0 is greedy decoding, whatever the seed.
        top_p: probability mass kept by nucleus sampling.

    Raises:
        ConfigError: a number is out of range, prompt and new tokens do not fit the model's context, or the model cannot
            generate or is not causal.
        CheckpointError, DataError, HubUnavailable: no model or tokenizer was found, or they do not belong together.
    """
    sampling = sampling_arguments(temperature, top_p, max_new_tokens)
    if not is_unicode(prompt):
        raise ConfigError("the prompt is not valid Unicode: it holds a lone surrogate")
    model = load_for_inference(folder, device)
    tokenizer = load_tokenizer(folder)
    prompt_ids = [opening_token(tokenizer), *tokenizer(prompt, add_special_tokens=False).input_ids]
    require_known_tokens(model, max(prompt_ids))
    _check_room(model.config, len(prompt_ids), max_new_tokens)
    eos = tokenizer.eos_token_id
    token_ids = continued(model, prompt_ids, seed=seed, eos_token_id=eos, pad_token_id=eos, **sampling)
    # With some tokenizers, decoding the new tokens alone would drop the space before them.
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    return tokenizer.decode(token_ids, skip_special_tokens=True)[len(before) :]


def continued(model: PreTrainedModel, token_ids: list[int], *, seed: int, **arguments: Any) -> Tensor:
    """The tokens and their continuation by ``model.generate`` with these arguments; the same seed gives the same.

    Raises:
        ConfigError: the model cannot generate.
    """
    # For ``running``: generation also depends on the defaults in generation_config.json.
    what = "generate with its config.json and generation_config.json"
    with running(model, what), torch.random.fork_rng():
        torch.manual_seed(seed)
        input_ids = torch.tensor([token_ids], device=model.device)
        return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=True, **arguments)[0]


def sampling_arguments(temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of ``model.generate`` that replace the model's own sampling defaults; temperature 0 is greedy.

    Raises:
        ConfigError: a number is out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature={temperature:g} must be 0 or more, top_p={top_p:g} above 0 and at most 1, "
            f"max_new_tokens={max_new_tokens} at least 1"
        )
    if temperature == 0:
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    else:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {**how, "max_new_tokens": max_new_tokens}


def _check_room(config: object, num_prompt_tokens: int, max_new_tokens: int) -> None:
    num_positions = getattr(config, "max_position_embeddings", None)
    if num_positions is not None and num_prompt_tokens + max_new_tokens > num_positions:
        raise ConfigError(
            f"{num_prompt_tokens} tokens of prompt and {max_new_tokens} new ones are more than the model's "
            f"{num_positions} positions. Shorten the prompt, or ask for fewer new tokens.",
            num_prompt_tokens=num_prompt_tokens,
            max_position_embeddings=num_positions,
        )
