"""Models of ``transformers``, built from a configuration and from plain named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from steplm.errors import ConfigError
from steplm.models.device import move
from steplm.units import nearest, reason

# Keys of earlier transformers that its configurations still take, and turn into ``rope_parameters``.
ACCEPTED_KEYS = ("rope_theta", "rope_scaling")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def hf_config(values: Mapping[str, Any], num_hidden_layers: int | None = None) -> PretrainedConfig:
    """A ``transformers`` configuration from its keys, at another depth if asked for.

    Raises:
        ConfigError: unknown model type, or a key that this type does not have.
    """
    values = dict(values)
    model_type = str(values.pop("model_type"))
    try:
        default = AutoConfig.for_model(model_type)
    except (ValueError, KeyError):
        from transformers import CONFIG_MAPPING

        hint = nearest(model_type, CONFIG_MAPPING.keys(), otherwise="")
        raise ConfigError(f"transformers knows no model type {model_type!r}.{hint}", model_type=model_type) from None
    if not hasattr(default, "num_key_value_heads") and (
        values.get("num_key_value_heads") == values.get("num_attention_heads")
    ):
        values.pop("num_key_value_heads", None)  # a family without grouped queries
    for key in values:
        if not hasattr(default, key) and key not in ACCEPTED_KEYS:
            hint = nearest(key, default.to_dict(), otherwise="")
            raise ConfigError(f"the configuration of {model_type!r} has no key {key!r}.{hint}", key=key)
    if num_hidden_layers is not None:
        values["num_hidden_layers"] = num_hidden_layers
        if "layer_types" in values:
            values["layer_types"] = values["layer_types"][:num_hidden_layers]
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # of any kind: a key of the wrong type is found only where it is used
        raise ConfigError(f"transformers refuses this configuration of {model_type!r}: {reason(error)}") from None
    config.use_cache = False
    return config


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """The keys of a configuration that ``hf_config`` takes back."""
    known = AutoConfig.for_model(config.model_type)
    values = {key: value for key, value in config.to_dict().items() if hasattr(known, key)}
    return {**values, "model_type": config.model_type}


def build_model(
    config: PretrainedConfig, state: Mapping[str, Tensor], *, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal language model that holds exactly the tensors of ``state`` (full, named, unsharded).

    Tensors are taken over, not copied, where they are on ``device`` already.

    Raises:
        ConfigError: a tensor is missing, unexpected or of the wrong shape.
    """
    dtype = next(iter(state.values())).dtype
    with _parameters_on_meta():
        model = _from_config(config, dtype)
    try:
        missing, unexpected = model.load_state_dict(dict(state), strict=False, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"the weights do not fit the model: {error}") from None
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or unexpected:
        raise ConfigError(
            f"the weights do not fit the model: missing {absent[:5]}, unexpected {list(unexpected)[:5]}",
            missing=list(missing),
            unexpected=list(unexpected),
        )
    move(model, device)
    return model


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model whose parameters are on the meta device; buffers have their values."""
    with _parameters_on_meta():
        model = _from_config(config, dtype)
    model.tie_weights()
    return model


def initial_state(config: PretrainedConfig, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh weights by the model's own initialisation: drawn on the CPU in fp32, then rounded to ``dtype``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_config(config, torch.float32)
    return plain_state(model, dtype=dtype)


def fresh_layers(config: PretrainedConfig, *, seed: int, dtype: torch.dtype) -> Callable[[int], dict[str, Tensor]]:
    """A function from a layer's index to freshly initialised tensors of one layer, named below the layer."""
    from steplm.growth.grow import layer_prefix_of

    # Two tokens: embeddings and head are built with the layer, and thrown away.
    tiny = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    one_layer = hf_config({**config_values(config), **tiny, "vocab_size": 2}, num_hidden_layers=1)

    def fresh(index: int) -> dict[str, Tensor]:
        state = initial_state(one_layer, seed=seed * 1_000_003 + index, dtype=dtype)
        prefix = f"{layer_prefix_of(state)}.0."
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    return fresh


def plain_state(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's parameters by name; a tied tensor appears once. Shares storage unless cast."""
    return {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}


def _from_config(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    except Exception as error:  # as above
        if "scaled_dot_product_attention" not in str(error):
            raise ConfigError(f"transformers refuses this model configuration: {reason(error)}") from None
        # A few families (Gemma 2) soft-cap their attention logits, which SDPA cannot.
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, new parameters take no memory while buffers (rotary frequencies) are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
