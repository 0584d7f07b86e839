"""Counting a model's tensors, for families that are not written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steplm.errors import ConfigError
from steplm.models.shape import shape_from_model, shape_of
from steplm.planner.shape import FAMILIES, shape_from_hf_config

SMALL = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def meta_model(model_type: str, **values: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **values}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_counting_the_model_equals_counting_from_the_configuration(model_type: str, tied: bool) -> None:
    model = meta_model(model_type, tie_word_embeddings=tied)
    expected = shape_from_hf_config({"model_type": model_type, **SMALL, "tie_word_embeddings": tied})
    assert shape_from_model(model) == expected


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi", "opt", "starcoder2", "stablelm", "cohere"])
def test_any_decoder_family_is_counted_whole(model_type: str) -> None:
    values = {"ffn_dim": 24, "word_embed_proj_dim": 16} if model_type == "opt" else {}
    model = meta_model(model_type, **values)
    shape = shape_from_model(model)
    assert shape.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    names = {name for name, _ in model.named_parameters()}
    outside = {name for name in names if not name.startswith(f"{shape.layer_prefix}.")}
    assert outside == {name for name in names if name.startswith(tuple(p[:-1] for p in shape.outer_patterns))}


def test_a_family_that_is_not_written_down_is_counted_by_building_it() -> None:
    shape = shape_of({"model_type": "starcoder2", **SMALL})
    assert (shape.model_type, shape.num_hidden_layers) == ("starcoder2", 3)
    assert shape == shape_from_model(meta_model("starcoder2"))


def test_a_known_family_is_counted_without_building_it() -> None:
    values = {"model_type": "gemma2", **SMALL}
    assert shape_of(values) == shape_from_hf_config(values)


def test_layers_that_differ_are_refused_by_name() -> None:
    model = meta_model("llama")
    del model.model.layers[2].mlp.gate_proj
    with pytest.raises(ConfigError, match=r"model\.layers\.0 and model\.layers\.2 differ in mlp\.gate_proj"):
        shape_from_model(model)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = meta_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match="no list of 5 layers"):
        shape_from_model(model)
