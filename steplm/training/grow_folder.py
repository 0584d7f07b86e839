"""Depth up-scaling of any Hugging Face decoder: write a deeper model folder from a shallower one."""

from __future__ import annotations

import json
from pathlib import Path

from steplm.config import GrowthConfig
from steplm.errors import CheckpointError, GrowthError
from steplm.files import replacing
from steplm.growth.grow import grow as grow_state
from steplm.growth.grow import provenance
from steplm.models.build import dtype_of, fresh_layers, grown_config
from steplm.models.folder import (
    copy_companions,
    load_config_and_state,
    load_hf_config,
    require_plain_weights,
    save_folder,
)
from steplm.models.trial import require_unchanged_function
from steplm.planner.positions import make_layer_map
from steplm.problems import validated
from steplm.types import LayerMap, LayerProvenance, to_json


def grow(
    model: str | Path,
    *,
    to: int,
    output_dir: str | Path,
    operator: str = "interpolation_mean",
    position: str | None = None,
    seed: int = 0,
) -> LayerMap:
    """Grow ``model`` to ``to`` layers with ``operator`` and write the result to ``output_dir``.

    Args:
        model: Hugging Face folder or hub name of a decoder-only model.
        to: number of layers after growth.
        operator: interpolation, interpolation_mean, stack, identity or random.
        position: upper (default), intermediate, lower, random or even; stack always goes on top.

    Returns:
        For each layer of the grown model, its parents in the old one.

    Raises:
        ConfigError: the operator or position does not exist, or they cannot be combined.
        GrowthError: ``to`` is not larger than the current depth, or the layers differ in shape.
        CheckpointError: there is no model at ``model``, or ``output_dir`` is not empty.
        WriteError: the files cannot be written.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise CheckpointError(f"{output_dir} is not empty: choose another folder", path=str(output_dir))
    growth = validated(GrowthConfig, {"operator": operator, "position": position})
    config = load_hf_config(model)
    require_plain_weights(config, model)
    num_old = config.num_hidden_layers
    if to <= num_old:
        raise GrowthError(
            f"cannot grow to {to} layers: {model} has {num_old} already", num_hidden_layers=num_old, to=to
        )
    layer_map = make_layer_map(num_old, to - num_old, growth.resolved_position, seed)
    grown_hf_config = grown_config(config, layer_map)
    require_unchanged_function(config, operator)
    _, state = load_config_and_state(model)
    grown_hf_config.use_cache = True
    fresh = fresh_layers(grown_hf_config, seed=seed, dtype=dtype_of(state))
    grown = grow_state(state, layer_map, operator, fresh_layer=fresh)
    with replacing(output_dir.resolve()) as temporary:
        save_folder(temporary, grown_hf_config, grown)
        old = tuple(LayerProvenance(1, (), None) for _ in range(num_old))
        layers = [to_json(layer) for layer in provenance(old, layer_map, 2, operator)]
        (temporary / "provenance.json").write_text(json.dumps(layers, indent=1) + "\n")
        copy_companions(model, temporary)
    return layer_map
