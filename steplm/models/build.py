"""Build ``transformers`` models from a configuration and plain named tensors."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steplm.config import ModelConfig
from steplm.cost.measure import find_layers
from steplm.errors import ConfigError
from steplm.growth.grow import grow_config, select_layers
from steplm.models.device import move
from steplm.types import LayerMap
from steplm.units import in_one_line, nearest

# Keys from earlier transformers versions that configurations still accept and convert to ``rope_parameters``.
ACCEPTED_KEYS = ("rope_theta", "rope_scaling")
OWN_KEYS = frozenset(ModelConfig.model_fields)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TINY_VOCABULARY = 16  # tokens
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def hf_config(values: Mapping[str, Any], layers: Sequence[int] | int | None = None) -> PretrainedConfig:
    """Build a ``transformers`` configuration from its keys.

    Args:
        values: Hugging Face configuration keys, including ``model_type``. Keys that are None are dropped if the family
            does not have them. With ``transformers_version``, as in a ``config.json``, other keys that it does not
            have are allowed, too, and have no effect.
        layers: for a shallower model, the indices of its layers, or their number from the bottom.

    Raises:
        ConfigError: the model type is unknown or not a decoder-only language model, or a key is used by neither the
            configuration nor the modeling code of this type.
    """
    values = dict(values)
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        hint = nearest(model_type, CONFIG_MAPPING.keys(), otherwise="")
        raise ConfigError(f"transformers does not know the model type {model_type!r}.{hint}", model_type=model_type)
    default = _default_config(model_type)
    is_written = values.pop("transformers_version", None) is not None
    if not hasattr(default, "num_key_value_heads") and (
        values.get("num_key_value_heads") == values.get("num_attention_heads")
    ):
        values.pop("num_key_value_heads", None)  # a family without grouped queries
    for key, value in list(values.items()):
        if not _is_read(default, key):
            if value is None:  # lets users drop a key of ``model`` that the family lacks
                del values[key]
                continue
            if is_written:
                continue
            hint = nearest(key, default.to_dict(), otherwise="")
            if key in OWN_KEYS:
                hint += f" Set model.extra.{key}=null, and the family's own key, if it has one, in model.extra."
            raise ConfigError(f"the configuration of {model_type!r} has no key {key!r}.{hint}", key=key)
    with _refusals(f"transformers refuses this configuration of {model_type!r}"):
        config = AutoConfig.for_model(model_type, **values)
    require_decoder_only(config)
    require_possible_dropout(config)
    _leave_out_foreign_tokens(config, given=values)
    config.use_cache = False
    without_extra_outputs(config)
    if layers is None:
        return config
    return with_layers(config, range(layers) if isinstance(layers, int) else layers)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn errors of any type into a ``ConfigError``: a value of the wrong type fails only where it is used."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{what}: {in_one_line(error)}") from None


def _leave_out_foreign_tokens(config: PretrainedConfig, given: Mapping[str, Any]) -> None:
    """Clear default special tokens outside the vocabulary: they belong to another tokenizer, and no model would load.

    Raises:
        ConfigError: an explicitly given special token is outside the vocabulary.
    """
    for key in SPECIAL_TOKENS:
        value, vocab_size = getattr(config, key, None), getattr(config, "vocab_size", None)
        if not isinstance(value, int) or vocab_size is None or value < vocab_size:
            continue
        if key in given:
            raise ConfigError(
                f"model.extra.{key} is {value}, but the vocabulary ends at {vocab_size - 1}",
                key=key,
                value=value,
            )
        with suppress(Exception):  # a few families insist on a number
            setattr(config, key, None)


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """The keys of a configuration that ``hf_config`` accepts."""
    default = _default_config(config.model_type)
    values = {key: value for key, value in config.to_dict().items() if _is_read(default, key)}
    return {**values, "model_type": config.model_type}


def _default_config(model_type: str) -> PretrainedConfig:
    with _refusals(f"transformers cannot make a configuration for {model_type!r}"):  # a few have no valid default
        config = AutoConfig.for_model(model_type)
    config.allow_global_per_layer_attribute_access = True  # otherwise, keys that differ by layer raise
    require_decoder_only(config)
    return config


def require_decoder_only(config: PretrainedConfig) -> None:
    """Require a single text decoder whose layers all have the same width.

    Raises:
        ConfigError: it is not.
    """
    kind = f"model type {config.model_type!r}"
    try:
        text_config = config.get_text_config()
    except ValueError:  # it has several text configs
        text_config = None
    if text_config is not config:
        own = getattr(text_config, "model_type", None)
        hint = f" Its text model is {own!r}." if own in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""
        raise ConfigError(f"{kind} is more than a language model; only text models can be trained and grown.{hint}")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{kind} is an encoder-decoder; only decoders can be trained and grown.")
    # The first releases of transformers 5 have neither attribute.
    asks_globally = getattr(config, "allow_global_per_layer_attribute_access", False)
    if getattr(config, "is_heterogeneous", False) and not asks_globally:
        widths = ", ".join(sorted(config.per_layer_attributes or ()))
        raise ConfigError(f"{kind} has layers that differ in {widths}: only models of equal layers can grow.")
    if not hasattr(config, "num_hidden_layers"):
        raise ConfigError(f"{kind} does not keep its layers in one list; only such models can be trained and grown.")


def require_possible_dropout(config: PretrainedConfig) -> None:
    """Require that dropout rates, which ``transformers`` reads only when it trains, are probabilities.

    Raises:
        ConfigError: one is not.
    """
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ConfigError(f"{key} is {value}, but must be from 0 to 1.", key=key, value=value)


def without_extra_outputs(config: PretrainedConfig) -> None:
    """Turn off the return of attention weights and hidden states: nothing here reads them, and they stay in memory."""
    for key in ("output_attentions", "output_hidden_states"):
        if getattr(config, key, None):
            setattr(config, key, False)


def with_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model whose layer ``i`` is configured like layer ``layers[i]`` of this one.

    Raises:
        ConfigError: a layer of the new model would differ from its original.
    """
    return _checked(config, select_layers(config.to_dict(), layers), layers)


def grown_config(config: PretrainedConfig, layer_map: LayerMap) -> PretrainedConfig:
    """The configuration of the grown model; a new layer is configured like its first parent.

    Raises:
        GrowthError: the map is for another depth.
        ConfigError: as ``with_layers``.
    """
    values = grow_config(config.to_dict(), layer_map)
    return _checked(config, values, [origin.parents[0] for origin in layer_map.origins])


def build_model(config: PretrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Build a causal language model on the CPU from exactly the tensors of ``state`` (full, named, unsharded).

    Tensors that are already on the CPU are used directly, not copied.

    Raises:
        ConfigError: a tensor is missing, unexpected or of the wrong shape.
    """
    with _parameters_on_meta():
        model = _from_config(config, dtype_of(state))
    model.tie_weights()
    _check_shapes(*_shapes(model), {name: tensor.shape for name, tensor in state.items()})
    model.load_state_dict(dict(state), strict=False, assign=True)
    model.tie_weights()
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ConfigError(f"the weights do not fit the model: {describe_misfit(absent, [])}", missing=absent)
    move(model, "cpu")
    return model


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model with parameters on the meta device but real buffers.

    Raises:
        ConfigError: the model has persistent buffers, which sharding does not support.
    """
    with _parameters_on_meta():
        model = _from_config(config, dtype)
    if buffers := saved_buffers(model):
        raise ConfigError(
            f"model type {config.model_type!r} keeps {next(iter(buffers))} as a buffer, which is not carried through "
            "sharded training. Use one device, or set distributed.shard_size=1.",
            model_type=config.model_type,
        )
    model.tie_weights()
    return model


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a causal language model on the meta device, with names, shapes and settings but no memory use.

    Raises:
        ConfigError: transformers cannot build a model from this configuration.
    """
    with torch.device("meta"):
        return _from_config(config, torch.float32)


def check_state(config: PretrainedConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Require that tensors of these names and shapes are a complete model, so that no weight is left random.

    Raises:
        ConfigError: a tensor is missing, unexpected or of the wrong shape.
    """
    _check_shapes(*_shapes_of(config.to_json_string(use_diff=False)), shapes)


def initial_state(config: PretrainedConfig, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh weights from the model's own initialization, drawn on the CPU in fp32 and then rounded to ``dtype``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_config(config, torch.float32)
    return plain_state(model, dtype=dtype)


def fresh_layers(config: PretrainedConfig, *, seed: int, dtype: torch.dtype) -> Callable[[int], dict[str, Tensor]]:
    """Return a function that maps a layer index to freshly initialized tensors, named relative to the layer.

    Nothing is built until it is called. It then builds a single layer with a tiny vocabulary, initialized as in a model
    of the configuration's full depth, because some families (GPT-2) scale the initialization by depth.
    """

    @torch.no_grad()
    def fresh(index: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + index)
            model = _from_config(with_tiny_vocabulary(config, [index]), torch.float32)
            layer = find_layers(model, 1)[1][0]
            model.config.num_hidden_layers = config.num_hidden_layers
            layer.apply(model._init_weights)
        return plain_state(layer, dtype=dtype)

    return fresh


def with_tiny_vocabulary(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model with these layers and a tiny vocabulary, to test layers cheaply."""
    special = {key: 0 for key in SPECIAL_TOKENS if hasattr(config, key)}
    return _parsed(config, select_layers(config.to_dict(), layers) | special | {"vocab_size": TINY_VOCABULARY})


def plain_state(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers, by name; a tied tensor appears once.

    Tensors share storage with the model unless cast to ``dtype``. Buffers keep their own dtype.
    """
    parameters = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    return parameters | saved_buffers(model)


def dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the weights, taken from the largest tensor because buffers can have another dtype."""
    return max(state.values(), key=Tensor.numel).dtype


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a model, such as router biases, by name."""
    saved = model.state_dict().keys()
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name in saved}


def _is_read(default: PretrainedConfig, key: str) -> bool:
    """Whether a model type uses a key: it has a default, or the modeling code reads it if present (``head_dim``)."""
    return key in ACCEPTED_KEYS or hasattr(default, key) or _is_read_by_model(default.model_type, key)


@cache
def _is_read_by_model(model_type: str, key: str) -> bool:
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    except KeyError:  # not a causal language model
        return False
    source = inspect.getsource(sys.modules[model_class.__module__])
    return re.search(rf"(config\.|[\"']){re.escape(key)}\b", source) is not None


def _checked(config: PretrainedConfig, values: dict[str, Any], layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of ``values``; checks that its layer ``i`` matches layer ``layers[i]`` of ``config``."""
    if list(layers) == list(range(config.num_hidden_layers)):
        return copy.deepcopy(config)
    result = _parsed(config, values)
    before, after = meta_model(config), meta_model(result)
    prefix, old_layers = find_layers(before, config.num_hidden_layers)
    _, new_layers = find_layers(after, result.num_hidden_layers)
    _check_outside(before, after, f"{prefix}.")
    for new, old in enumerate(layers):
        if differing := _differing(old_layers[old], old, new_layers[new], new):
            key, was, would_be = differing
            raise ConfigError(
                f"a {config.model_type!r} model of {len(layers)} layers cannot be made of one of {len(old_layers)}: "
                f"its layer {new} would have {key} {would_be}, and layer {old}, which it stands for, has {was}. "
                "The configuration sets up layers in a way that steplm does not follow.",
                layer=new,
                key=key,
            )
    return result


def _parsed(config: PretrainedConfig, values: dict[str, Any]) -> PretrainedConfig:
    """A configuration of the same type with other values."""
    with _refusals(f"transformers refuses this configuration of {config.model_type!r}"):
        result = type(config).from_dict(values)
    result.use_cache = config.use_cache
    return result


def _check_outside(before: nn.Module, after: nn.Module, layers: str) -> None:
    """Require that tensor shapes outside the layers do not depend on the depth."""
    shapes = [
        {name: tuple(t.shape) for name, t in plain_state(model).items() if not name.startswith(layers)}
        for model in (before, after)
    ]
    if differing := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ConfigError(f"{differing[0]} has another shape at another depth: this model cannot grow.")


def _differing(old: nn.Module, old_index: int, new: nn.Module, new_index: int) -> tuple[str, Any, Any] | None:
    """The first setting that differs between two layers, other than their own index, and both values."""
    was, would_be = _settings(old), _settings(new)
    for key in sorted(was.keys() | would_be.keys()):
        values = was.get(key, "none"), would_be.get(key, "none")
        if values[0] != values[1] and values != (old_index, new_index):
            return key, *values
    return None


def _settings(layer: nn.Module) -> dict[str, Any]:
    """The shapes of a layer's tensors and the plain attributes of its modules, by name."""
    found: dict[str, Any] = {name: list(tensor.shape) for name, tensor in plain_state(layer).items()}
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            # Floats are ignored: a few families scale values by depth, which per-layer config lists do not control.
            if not key.startswith("_") and (value is None or isinstance(value, bool | int | str)):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


Shapes = Mapping[str, Sequence[int]]


@lru_cache(maxsize=8)  # every save asks for the same
def _shapes_of(config_json: str) -> tuple[Shapes, Set[str]]:
    values = json.loads(config_json, object_hook=_decoded)
    return _shapes(meta_model(CONFIG_MAPPING[values["model_type"]].from_dict(values)))


def _decoded(value: dict[str, Any]) -> Any:
    """``transformers`` writes infinity and NaN as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _shapes(model: PreTrainedModel) -> tuple[Shapes, Set[str]]:
    """The shape of every tensor of a model, and all names, since a tied tensor may appear under others as well."""
    expected = {name: tuple(tensor.shape) for name, tensor in plain_state(model).items()}
    return expected, expected.keys() | model.state_dict().keys()


def _check_shapes(expected: Shapes, known: Set[str], shapes: Shapes) -> None:
    missing, unexpected = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - known)
    if missing or unexpected:
        raise ConfigError(
            f"the weights do not fit the model: {describe_misfit(missing, unexpected)}",
            missing=missing,
            unexpected=unexpected,
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise ConfigError(
                f"the weights do not fit the model: {name} is {list(shapes[name])}, and its configuration says "
                f"{list(shape)}",
                name=name,
            )


def describe_misfit(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Describe missing and unexpected tensors, or the name prefix that a wrapper has added."""
    for prefix in ("_orig_mod.", "module."):
        if any(name.startswith(prefix) for name in unexpected):
            wrapper = "torch.compile" if prefix == "_orig_mod." else "DistributedDataParallel"
            return (
                f"{len(unexpected)} tensors are named {prefix!r}…, as {wrapper} does ({unexpected[0]}). "
                f"Remove this prefix from their names."
            )
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return ", ".join(parts)


def _from_config(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    implementations = ["sdpa", "eager"]  # a few families (Gemma 2) soft-cap their attention logits, which SDPA cannot
    with no_padding_index():
        for implementation in implementations:
            try:
                return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
            except Exception as error:  # any type, as in _refusals
                why = in_one_line(error)
                if "scaled_dot_product_attention" not in str(error):
                    break
    raise ConfigError(f"transformers has no causal language model for this {config.model_type!r} configuration: {why}")


@contextmanager
def no_padding_index() -> Iterator[None]:
    """Create embeddings without a padding index, whose row would start at zero and never be trained.

    Training uses no padding, and a family's default ``pad_token_id`` can be any token of the tokenizer used here.
    """
    original = nn.Embedding.__init__

    def without(
        self: nn.Embedding, num: int, dim: int, padding_idx: int | None = None, *args: Any, **keys: Any
    ) -> None:
        original(self, num, dim, None, *args, **keys)

    nn.Embedding.__init__ = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Embedding.__init__ = original  # type: ignore[method-assign]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device, without drawing values for them; buffers are computed as usual."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    with register_module_parameter_registration_hook(on_meta), no_init_weights():  # type: ignore[arg-type]
        yield
