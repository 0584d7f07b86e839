"""Counting parameters without the model: the reference is the model itself, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steplm.errors import ConfigError
from steplm.planner.shape import FAMILIES, shape_from_hf_config

NO_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def meta_model(model_type: str, **values: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**NO_SPECIAL_TOKENS, **values}))


@st.composite
def configurations(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    """Small sizes of every relation: wide and narrow heads, grouped and multi-query, tied or not."""
    key_value_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    heads = key_value_heads * group
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(5, 40)),
        "hidden_size": heads * draw(st.sampled_from([2, 4, 6])),
        "intermediate_size": draw(st.integers(1, 30)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": draw(st.booleans()),
    }
    default = AutoConfig.for_model(model_type).to_dict()
    if "head_dim" in default:
        values["head_dim"] = draw(st.sampled_from([2, 8]))
    for key in ("attention_bias", "mlp_bias"):
        if key in default:
            values[key] = draw(st.booleans())
    return values


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_counts_equal_those_of_the_meta_device_model(model_type: str, data: st.DataObject) -> None:
    values = data.draw(configurations(model_type))
    model = meta_model(model_type, **values)
    shape = shape_from_hf_config({"model_type": model_type, **values})

    linears = {
        name: (module.in_features, module.out_features, module.bias is not None)
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, nn.Linear)
    }
    assert {linear.name: (linear.in_features, linear.out_features, linear.bias) for linear in shape.linears} == linears
    for layer in model.model.layers:
        assert shape.layer_parameters == sum(parameter.numel() for parameter in layer.parameters())
    assert shape.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_parameters(7) - shape.num_parameters(5) == 2 * shape.layer_parameters


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_keys_take_the_familys_own_default(model_type: str) -> None:
    model = meta_model(model_type)
    shape = shape_from_hf_config({"model_type": model_type})
    assert shape.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert shape.tie_word_embeddings == (shape.head_parameters == 0) == model.config.tie_word_embeddings
    assert shape.num_hidden_layers == model.config.num_hidden_layers


def test_llama_7b_has_its_published_number_of_parameters() -> None:
    assert shape_from_hf_config({"model_type": "llama"}).num_parameters() == 6_738_415_616


def test_layer_follows_the_formula_for_grouped_query_attention() -> None:
    d, f, h, h_kv = 1024, 2736, 16, 4
    shape = shape_from_hf_config(
        {
            "model_type": "llama",
            "hidden_size": d,
            "intermediate_size": f,
            "num_attention_heads": h,
            "num_key_value_heads": h_kv,
        }
    )
    assert shape.layer_parameters == 2 * d * d + 2 * d * (h_kv * d // h) + 3 * d * f + 2 * d


@pytest.mark.parametrize("model_type", FAMILIES)
def test_outer_patterns_match_exactly_the_parameters_outside_the_layers(model_type: str) -> None:
    from fnmatch import fnmatchcase

    for tied in (True, False):
        values = {
            "vocab_size": 10, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied,
        }  # fmt: skip
        names = [name for name, _ in meta_model(model_type, **values).named_parameters()]
        shape = shape_from_hf_config({"model_type": model_type, **values})
        matched = {name for name in names if any(fnmatchcase(name, p) for p in shape.outer_patterns)}
        assert matched == {name for name in names if not name.startswith(f"{shape.layer_prefix}.")}
        for pattern in shape.outer_patterns:
            assert any(fnmatchcase(name, pattern) for name in names), f"{pattern} matches nothing"


def test_unknown_model_type_names_the_known_ones_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"'lama'.*Did you mean 'llama'.*qwen3.*shape_from_model"):
        shape_from_hf_config({"model_type": "lama"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            "hidden_size=30 is not divisible by num_attention_heads=4",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads=4 .* num_key_value_heads=3",
        ),
        ({"hidden_size": 12, "num_attention_heads": 4}, "head_dim is 3, .* even"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, not 0"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number of at least 1, not 'many'"),
    ],
)
def test_sizes_that_make_no_model_are_refused_with_the_numbers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_from_hf_config({"model_type": "llama", "num_key_value_heads": None, **values})
