import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from steplm.errors import GrowthError
from steplm.growth.grow import (
    grow,
    grow_config,
    layer_prefix_of,
    positions_in_final,
    provenance,
    renamed,
    select_layers,
)
from steplm.growth.operators import OPERATORS
from steplm.types import LayerMap, LayerOrigin, LayerProvenance

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma": SMALL,
    "gemma2": {**SMALL, "sliding_window": 8},
    "gpt2": GPT2,
    "gpt_neox": {key: value for key, value in SMALL.items() if key != "head_dim"},
    "opt": {
        "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
}  # fmt: skip

# old layers 0 1 2 -> 0 (0-1) 1 (1-2) (1-2) 2
MIXED = LayerMap(
    (
        LayerOrigin((0,)),
        LayerOrigin((0, 1), is_new=True, fraction=0.5),
        LayerOrigin((1,)),
        LayerOrigin((1, 2), is_new=True, fraction=1 / 3),
        LayerOrigin((1, 2), is_new=True, fraction=2 / 3),
        LayerOrigin((2,)),
    )
)
KEPT = {0: 0, 2: 1, 5: 2}


def family_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: ones and zeros would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def grown_model(model: torch.nn.Module, operator: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    values = model.config.to_dict()
    config = AutoConfig.for_model(**grow_config(values, MIXED))
    fresh = weights_of(AutoModelForCausalLM.from_config(config))
    prefix = layer_prefix_of(fresh)

    def fresh_layer(index: int) -> dict[str, torch.Tensor]:
        start = f"{prefix}.{index}."
        return {name.removeprefix(start): t for name, t in fresh.items() if name.startswith(start)}

    state = grow(weights_of(model), MIXED, operator, fresh_layer=fresh_layer)
    result = AutoModelForCausalLM.from_config(config).eval()
    report = result.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"lm_head.weight"}, "only a tied head may be absent"
    result.tie_weights()
    return result, state


@pytest.mark.parametrize("family", FAMILIES)
def test_function_preserving_growth_leaves_every_logit_unchanged(family):
    model = family_model(family)
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        before = model(tokens).logits
        for operator in (name for name, kind in OPERATORS.items() if kind.function_preserving):
            after = grown_model(model, operator)[0](tokens).logits
            assert torch.equal(before, after), operator
        # and the check can fail: another operator does change the logits
        assert not torch.allclose(before, grown_model(model, "interpolation")[0](tokens).logits)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_model_of_the_grown_config_holds_the_grown_state_in_the_right_layers(family, operator):
    model = family_model(family)
    result, state = grown_model(model, operator)
    loaded = dict(result.named_parameters())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    layers = result.get_submodule(layer_prefix_of(state))
    old_layers = model.get_submodule(layer_prefix_of(state))
    assert len(layers) == 6
    for new, old in KEPT.items():
        for name, parameter in old_layers[old].named_parameters():
            assert torch.equal(layers[new].get_parameter(name), parameter)
    indices = [[m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")] for layer in layers]
    assert all(found and set(found) == {index} for index, found in enumerate(indices))


@pytest.mark.parametrize("operator", OPERATORS)
def test_safetensors_saves_and_reads_the_grown_state(tmp_path, operator):
    _, state = grown_model(family_model("llama"), operator)
    save_file(state, tmp_path / "model.safetensors")
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_kept_layers_are_the_input_tensors_themselves():
    state = weights_of(family_model("llama"))
    grown = grow(state, MIXED, "interpolation_mean")
    for new, old in KEPT.items():
        name = "self_attn.q_proj.weight"
        assert grown[f"model.layers.{new}.{name}"] is state[f"model.layers.{old}.{name}"]
    assert grown["model.embed_tokens.weight"] is state["model.embed_tokens.weight"]


def test_growing_without_new_layers_changes_nothing():
    state = weights_of(family_model("llama"))
    same = LayerMap(tuple(LayerOrigin((i,)) for i in range(3)))
    grown = grow(state, same, "interpolation_mean")
    assert grown == state  # the very same tensors


def test_two_growths_renumber_layers_beyond_nine():
    state = {f"model.layers.{i}.norm.weight": torch.tensor([float(i)]) for i in range(9)}
    origins = [LayerOrigin((i,)) for i in range(9)]
    grown = grow(state, LayerMap((*origins[:1], *(LayerOrigin((0,), True),) * 4, *origins[1:])), "interpolation")
    assert [grown[f"model.layers.{i}.norm.weight"].item() for i in range(13)] == [0, 0, 0, 0, 0, *range(1, 9)]


def test_a_map_for_another_depth_is_refused_with_both_numbers():
    state = weights_of(family_model("llama"))
    with pytest.raises(GrowthError, match=r"3 layers, the layer map keeps 2") as error:
        grow(state, LayerMap((LayerOrigin((0,)), LayerOrigin((1,)))), "stack")
    assert (error.value.num_layers, error.value.num_kept) == (3, 2)


@pytest.mark.parametrize(
    "origins",
    [
        (LayerOrigin((1,)), LayerOrigin((0,)), LayerOrigin((2,))),
        (LayerOrigin((0,)), LayerOrigin((0,)), LayerOrigin((1,)), LayerOrigin((2,))),
        (LayerOrigin((0,)), LayerOrigin((1,)), LayerOrigin((2,)), LayerOrigin((2, 3), is_new=True)),
        (LayerOrigin((0,)), LayerOrigin((1,)), LayerOrigin((2,)), LayerOrigin((), is_new=True)),
    ],
    ids=["out of order", "kept twice", "parent that is not there", "no parent"],
)
def test_a_map_that_is_not_a_growth_is_refused(origins):
    with pytest.raises(GrowthError, match="layer map"):
        grow(weights_of(family_model("llama")), LayerMap(origins), "interpolation")


def test_layers_that_differ_are_refused_by_name():
    state = weights_of(family_model("llama"))
    other_shape = {**state, "model.layers.1.mlp.up_proj.weight": torch.zeros(7, 32)}
    with pytest.raises(GrowthError, match=r"up_proj\.weight' is \[48, 32\] float32 .* \[7, 32\] float32"):
        grow(other_shape, MIXED, "interpolation")
    other_name = {**state, "model.layers.1.mlp.up_proj.bias": torch.zeros(48)}
    with pytest.raises(GrowthError, match=r"up_proj\.bias' is missing"):
        grow(other_name, MIXED, "interpolation")
    hole = {name: t for name, t in state.items() if ".layers.1." not in name}
    with pytest.raises(GrowthError, match=r"lack model\.layers\.1\."):
        grow(hole, MIXED, "interpolation")


def test_an_unknown_operator_names_the_nearest_one():
    with pytest.raises(GrowthError, match="Did you mean 'interpolation_mean'"):
        grow(weights_of(family_model("llama")), MIXED, "interpolation_men")


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("llama", "model.layers"), ("gpt2", "transformer.h"), ("gpt_neox", "gpt_neox.layers"),
        ("opt", "model.decoder.layers"),
    ],
)  # fmt: skip
def test_layer_prefix_is_found_in_every_family(family, prefix):
    assert layer_prefix_of(weights_of(family_model(family))) == prefix


def test_names_without_exactly_one_list_of_layers_are_refused():
    assert layer_prefix_of(["model.layers.0.mlp.experts.3.w1.weight", "x"]) == "model.layers"
    with pytest.raises(GrowthError, match="found none"):
        layer_prefix_of(["model.norm.weight"])
    with pytest.raises(GrowthError, match="found 2"):
        layer_prefix_of(["encoder.block.0.weight", "decoder.block.0.weight"])


def test_renamed_follows_kept_layers_and_leaves_other_names():
    names = ["model.embed_tokens.weight", "model.layers.0.a.weight", "model.layers.2.a.weight"]
    assert renamed(names, MIXED) == {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.0.a.weight": "model.layers.0.a.weight",
        "model.layers.2.a.weight": "model.layers.5.a.weight",
    }


def test_renamed_tensors_are_the_ones_that_grow_keeps():
    state = weights_of(family_model("llama"))
    grown = grow(state, MIXED, "interpolation")
    assert all(grown[new] is state[old] for old, new in renamed(state, MIXED).items())


def test_grow_config_renews_depth_and_per_layer_lists():
    config = {
        "model_type": "some",
        "num_hidden_layers": 3,
        "layer_types": ["full", "sliding", "full"],
        "no_rope_layers": [1, 1, 0],
        "mlp_layer_types": ("dense", "sparse", "sparse"),
        "mlp_only_layers": [1],
        "eos_token_id": [7, 8, 9],
        "hidden_size": 3,
    }
    before = copy.deepcopy(config)
    assert grow_config(config, MIXED) == {
        "model_type": "some",
        "num_hidden_layers": 6,
        "layer_types": ["full", "full", "sliding", "sliding", "sliding", "full"],
        "no_rope_layers": [1, 1, 1, 1, 1, 0],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse", "sparse"],
        "mlp_only_layers": [2, 3, 4],
        "eos_token_id": [7, 8, 9],
        "hidden_size": 3,
    }
    assert config == before


def test_grow_config_refuses_another_depth_or_none():
    assert grow_config({"n_layer": 3}, MIXED) == {"n_layer": 6}
    with pytest.raises(GrowthError, match="4 layers, the layer map keeps 3"):
        grow_config({"num_hidden_layers": 4}, MIXED)
    with pytest.raises(GrowthError, match="num_hidden_layers"):
        grow_config({"hidden_size": 4}, MIXED)


def test_selected_layers_keep_their_settings_and_boundaries_between_them():
    config = {
        "num_hidden_layers": 6,
        "layer_types": ["a", "b", "c", "d", "e", "f"],
        "mlp_only_layers": [0, 4],
        "first_k_dense_replace": 2,
        "max_window_layers": 28,
        "moe_layer_end_index": 4,
        "attention_types": [[["global", "local"], 3]],
    }
    assert select_layers(config, range(6)) == config
    assert select_layers(config, [1, 3, 4]) == {
        "num_hidden_layers": 3,
        "layer_types": ["b", "d", "e"],
        "mlp_only_layers": [2],
        "first_k_dense_replace": 1,
        "max_window_layers": 28,
        "moe_layer_end_index": 2,
        "attention_types": [[["local"], 1], [["local"], 1], [["global"], 1]],
    }
    assert select_layers({"n_layer": 2, "first_k_dense_replace": 2}, [0, 0, 1])["first_k_dense_replace"] == 3


def test_positions_in_the_final_model_follow_kept_layers_through_every_growth():
    second = LayerMap((*(LayerOrigin((i,)) for i in range(5)), LayerOrigin((4,), True), LayerOrigin((5,))))
    assert positions_in_final([], 3) == [0, 1, 2]
    assert positions_in_final([MIXED], 3) == [0, 2, 5]
    assert positions_in_final([MIXED, second], 3) == [0, 2, 6]


def test_provenance_keeps_the_history_of_kept_layers():
    old = (LayerProvenance(1, (), None), LayerProvenance(2, (0, 1), "identity"), LayerProvenance(1, (), None))
    new = provenance(old, MIXED, 3, "interpolation_mean")
    assert [new[index] for index in KEPT] == list(old)
    assert new[1] == LayerProvenance(3, (0, 1), "interpolation_mean")
    assert new[3] == new[4] == LayerProvenance(3, (1, 2), "interpolation_mean")
    assert provenance(old, MIXED, 3, "random")[1] == LayerProvenance(3, (), "random")
    with pytest.raises(GrowthError, match="2 layers, the layer map keeps 3"):
        provenance(old[:2], MIXED, 3, "stack")
