"""Compute ``ModelShape`` by counting a model's tensors, which works for any decoder-only family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from steplm.cost.measure import find_layers, name_of_head, outer_component
from steplm.errors import ConfigError
from steplm.planner.shape import FAMILIES, shape_from_hf_config
from steplm.types import LinearShape, ModelShape


def shape_of(values: Mapping[str, Any]) -> ModelShape:
    """The shape of the model with these configuration keys, of a known family or any other.

    Raises:
        ConfigError: there is no such model, or its layers are not one list of equal layers.
    """
    if str(values.get("model_type")) in FAMILIES:
        return shape_from_hf_config(values)
    from steplm.models.build import hf_config, meta_model

    return shape_from_model(meta_model(hf_config(values)))


def shape_from_model(model: PreTrainedModel) -> ModelShape:
    """The shape of a ``transformers`` model on any device (``meta`` needs no memory).

    Outside the layers, parameters of the output head count as head, other vectors as final norm, and
    other matrices as embeddings. A tied tensor counts once, where it first appears.

    Raises:
        ConfigError: there is no list of ``num_hidden_layers`` layers, or the layers differ in their parameters.
    """
    config = model.config.get_text_config()
    prefix, layers = find_layers(model, config.num_hidden_layers)
    _require_equal_layers(prefix, layers)
    linears = tuple(
        LinearShape(name, module.in_features, module.out_features, module.bias is not None)
        for name, module in layers[0].named_modules()
        if isinstance(module, nn.Linear)
    )
    in_linears = {id(p) for m in layers[0].modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    others = [parameter for parameter in layers[0].parameters() if id(parameter) not in in_linears]

    head = model.get_output_embeddings()
    head_name = name_of_head(model)
    counts = {"embeddings": 0, "final_norm": 0, "head": 0}
    tensors = [("layer", tuple(parameter.shape)) for parameter in others]
    modules: dict[str, dict[str, None]] = {component: {} for component in counts}  # ordered sets
    for name, parameter in model.named_parameters():
        if name.startswith(f"{prefix}."):
            continue
        component = outer_component(name, parameter, head_name)
        counts[component] += parameter.numel()
        tensors.append((component, tuple(parameter.shape)))
        modules[component][name.rpartition(".")[0]] = None

    heads = getattr(config, "num_attention_heads", None) or 1  # recurrent layers have none
    return ModelShape(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        tie_word_embeddings=head is not None and head.weight is model.get_input_embeddings().weight,
        linears=linears,
        other_layer_parameters=sum(parameter.numel() for parameter in others if parameter.dim() < 2),
        embedding_parameters=counts["embeddings"],
        final_norm_parameters=counts["final_norm"],
        head_parameters=counts["head"],
        layer_prefix=prefix,
        embedding_modules=tuple(modules["embeddings"]),
        final_norm_modules=tuple(modules["final_norm"]),
        head_modules=tuple(modules["head"]),
        other_layer_matrices=tuple(parameter.numel() for parameter in others if parameter.dim() >= 2),
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        attention_size=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        other_tensors=tuple(sorted(tensors)),
    )


def _require_equal_layers(prefix: str, layers: nn.ModuleList) -> None:
    signatures = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in layers]
    for index, signature in enumerate(signatures):
        if signature != signatures[0]:
            differing = sorted(dict(signature.items() ^ signatures[0].items()))
            raise ConfigError(
                f"layers {prefix}.0 and {prefix}.{index} differ in {', '.join(differing[:3])}: "
                "only models of equal layers can grow.",
                layer=index,
            )
