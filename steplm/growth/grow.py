"""Grow a model: weights, configuration and layer provenance, each a pure function of a layer map.

Weights are full, unsharded tensors under their Hugging Face names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from steplm.errors import GrowthError
from steplm.growth.operators import OPERATORS, Layer
from steplm.types import LayerMap, LayerProvenance
from steplm.units import nearest

# Configuration keys for the depth, across model families.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Lists of layer indices; every other list with "layer" or "types" in its name holds one entry per layer.
LAYER_INDEX_KEYS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices")
# Counts of bottom layers, or the index of the first layer above them; and the index of a last layer.
FIRST_LAYERS_KEYS = (
    "first_k_dense_replace", "num_dense_layers", "num_hash_layers", "max_window_layers", "moe_layer_start_index",
)  # fmt: skip
LAST_LAYER_KEYS = ("moe_layer_end_index",)

_NAME_IN_LAYER = re.compile(r"^(.+?)\.(\d+)\.(.+)$")


def layer_prefix_of(names: Iterable[str]) -> str:
    """The name of the list of layers, such as ``model.layers``, ``transformer.h`` or ``gpt_neox.layers``.

    Raises:
        GrowthError: the names contain no numbered layers, or more than one list of them.
    """
    prefixes = sorted({match.group(1) for match in map(_NAME_IN_LAYER.match, names) if match})
    if len(prefixes) != 1:
        found = f"{len(prefixes)} ({', '.join(prefixes)})" if prefixes else "none"
        raise GrowthError(
            f"expected one list of layers among the parameter names, such as 'model.layers.0.…', "
            f"found {found}. "
            "Only decoder-only models can grow.",
            prefixes=prefixes,
        )
    return prefixes[0]


def grow(
    state: Mapping[str, Tensor],
    layer_map: LayerMap,
    operator: str,
    *,
    fresh_layer: Callable[[int], Layer] | None = None,
) -> dict[str, Tensor]:
    """The weights of the grown model.

    Kept layers (renumbered) and everything outside the layers are the tensors of ``state`` themselves, because a copy
    would cost the memory of a second model. New layers are new tensors.

    Args:
        state: all weights of the old model, by name.
        layer_map: the origin of each layer of the grown model.
        operator: a key of ``OPERATORS``.
        fresh_layer: ``fresh_layer(i)`` returns freshly initialized tensors for layer ``i`` of the grown model, by name
            within the layer; needed only by operator ``random``.

    Raises:
        GrowthError: unknown operator, a layer map for another depth, or layers, old or fresh, that differ in names,
            shapes or dtypes.
    """
    if operator not in OPERATORS:
        raise GrowthError(f"no growth operator {operator!r}.{nearest(operator, OPERATORS)}", operator=operator)
    make = OPERATORS[operator]
    if make.fresh and fresh_layer is None:
        raise GrowthError(f"operator {operator!r} needs fresh_layer, a function that initializes a layer.")

    prefix = layer_prefix_of(state)
    outer, layers = _split(state, prefix)
    _check_map(layer_map, len(layers))
    _check_alike(layers, prefix)

    grown = outer
    for index, origin in enumerate(layer_map.origins):
        if not origin.is_new:
            layer: Layer = layers[origin.parents[0]]
        elif make.fresh:
            assert fresh_layer is not None
            model_layer = layers[origin.parents[0]]
            fresh = {name: tensor.to(model_layer.get(name, tensor)) for name, tensor in fresh_layer(index).items()}
            _check_alike([model_layer, fresh], f"fresh {prefix}")
            layer = _contiguous(make.function([fresh], 0.0))
        else:
            layer = _contiguous(make.function([layers[parent] for parent in origin.parents], origin.fraction))
        grown.update({f"{prefix}.{index}.{name}": tensor for name, tensor in layer.items()})
    return grown


def renamed(names: Iterable[str], layer_map: LayerMap) -> dict[str, str]:
    """Old name -> name in the grown model. No weight is lost: kept layers move up, all other names stay the same."""
    new_index = {layer_map.origins[index].parents[0]: index for index in layer_map.kept_layers}
    result = {}
    for name in names:
        match = _NAME_IN_LAYER.match(name)
        result[name] = f"{match.group(1)}.{new_index[int(match.group(2))]}.{match.group(3)}" if match else name
    return result


def grow_config(hf_config: Mapping[str, Any], layer_map: LayerMap) -> dict[str, Any]:
    """The Hugging Face configuration of the grown model; a new layer is configured like its first parent.

    Raises:
        GrowthError: the configuration has no depth, or a different one from the layer map.
    """
    _check_map(layer_map, depth_of(hf_config))
    return select_layers(hf_config, [origin.parents[0] for origin in layer_map.origins])


def depth_of(hf_config: Mapping[str, Any]) -> int:
    """Number of layers in a Hugging Face configuration.

    Raises:
        GrowthError: the configuration has no depth.
    """
    for key in DEPTH_KEYS:
        if isinstance(hf_config.get(key), int):
            return hf_config[key]
    raise GrowthError(f"the configuration has none of the keys {', '.join(DEPTH_KEYS)}: its depth is unknown.")


def select_layers(hf_config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The configuration of a model whose layer ``i`` is configured like layer ``layers[i]`` of this one.

    Updates the depth, lists with one entry per layer (``layer_types`` ...), lists of layer indices
    (``mlp_only_layers`` ...) and boundaries between layers (``first_k_dense_replace`` ...).

    Args:
        layers: indices in the given model, ascending; an index may be repeated or left out.

    Raises:
        GrowthError: the configuration has no depth.
    """
    num_layers = depth_of(hf_config)
    config = copy.deepcopy(dict(hf_config))
    if list(layers) == list(range(num_layers)):
        return config
    for key, value in config.items():
        if key in DEPTH_KEYS and value == num_layers:
            config[key] = len(layers)
        elif key in LAYER_INDEX_KEYS and isinstance(value, list | tuple):
            config[key] = [index for index, source in enumerate(layers) if source in value]
        elif key in FIRST_LAYERS_KEYS and isinstance(value, int):
            below = sum(source < value for source in layers)
            config[key] = max(value, below) if value >= num_layers else below  # a large value means all layers
        elif key in LAST_LAYER_KEYS and isinstance(value, int) and value >= 0:  # -1 is the last layer at any depth
            config[key] = sum(source <= value for source in layers) - 1
        elif key == "attention_types":  # GPT-Neo: [[["global", "local"], 12]], the types and how often they repeat
            types = [name for names, repeats in value for _ in range(repeats) for name in names]
            config[key] = [[[types[source]], 1] for source in layers]
        elif isinstance(value, list | tuple) and len(value) >= num_layers and _is_per_layer(key):
            config[key] = [value[source] for source in layers]
    return config


def _is_per_layer(key: str) -> bool:
    return ("layer" in key or key.endswith("types")) and not key.startswith("mtp")  # mtp: multi-token prediction


def positions_in_final(growths: Sequence[LayerMap], num_layers: int) -> list[int]:
    """For each layer of a model, its index after applying all of these growths in order."""
    positions = list(range(num_layers))
    for layer_map in growths:
        kept = layer_map.kept_layers
        positions = [kept[position] for position in positions]
    return positions


def provenance(
    old: tuple[LayerProvenance, ...], layer_map: LayerMap, stage_index: int, operator: str
) -> tuple[LayerProvenance, ...]:
    """The provenance of the grown model's layers: kept layers keep theirs, new layers are born in this stage."""
    _check_map(layer_map, len(old))
    return tuple(
        LayerProvenance(
            born_in_stage=stage_index,
            parents=() if OPERATORS[operator].fresh else origin.parents,
            operator=operator,
        )
        if origin.is_new
        else old[origin.parents[0]]
        for origin in layer_map.origins
    )


def _split(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Tensors outside the layers by name, and for each layer its tensors by name within the layer."""
    outer: dict[str, Tensor] = {}
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _NAME_IN_LAYER.match(name)
        if match is None:
            outer[name] = tensor
        else:
            layers.setdefault(int(match.group(2)), {})[match.group(3)] = tensor
    missing = sorted(set(range(max(layers) + 1)) - set(layers))
    if missing:
        raise GrowthError(f"the weights have {prefix}.{max(layers)} but lack {prefix}.{missing[0]}.", missing=missing)
    return outer, [layers[index] for index in range(len(layers))]


def _contiguous(layer: Layer) -> Layer:
    # clone() keeps the strides of the original, but weight files need contiguous tensors.
    return {name: tensor.contiguous() for name, tensor in layer.items()}


def _check_map(layer_map: LayerMap, num_layers: int) -> None:
    kept = [origin.parents for origin in layer_map.origins if not origin.is_new]
    if kept != [(index,) for index in range(num_layers)]:
        raise GrowthError(
            f"the model has {num_layers} layers, the layer map keeps {len(kept)} "
            f"({', '.join(str(parents[0]) for parents in kept)}): it must keep each layer once, in order.",
            num_layers=num_layers,
            num_kept=len(kept),
        )
    for index, origin in enumerate(layer_map.origins):
        if not 1 <= len(origin.parents) <= 2 or not all(0 <= parent < num_layers for parent in origin.parents):
            raise GrowthError(
                f"layer {index} of the layer map has the parents {origin.parents}: "
                f"expected one or two of the layers 0 to {num_layers - 1}.",
                layer=index,
                parents=origin.parents,
            )


def _check_alike(layers: list[Layer] | list[dict[str, Tensor]], prefix: str) -> None:
    """Require that every layer has the names, shapes and dtypes of the first."""
    first = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layers[0].items()}
    for index, layer in enumerate(layers):
        other = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.items()}
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise GrowthError(
                    f"layers differ: {name!r} is {_describe(first.get(name))} in {prefix}.0 and "
                    f"{_describe(other.get(name))} in {prefix}.{index}. Only equal layers can grow.",
                    name=name,
                    layer=index,
                )


def _describe(kind: tuple[tuple[int, ...], Any] | None) -> str:
    return "missing" if kind is None else f"{list(kind[0])} {str(kind[1]).removeprefix('torch.')}"
