from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from steplm.errors import CheckpointError, ConfigError, GrowthError, HubUnavailable
from steplm.growth.grow import layer_prefix_of, select_layers
from steplm.models.build import (
    build_model,
    config_values,
    fresh_layers,
    grown_config,
    hf_config,
    initial_state,
    meta_model,
    plain_state,
    with_layers,
)
from steplm.models.folder import load_config_and_state, load_pretrained, save_folder
from steplm.models.forward import batch_loss
from steplm.models.trial import require_trainable, require_unchanged_function
from steplm.types import LayerMap, LayerOrigin

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "cohere",
    "granite",
)

# old layers 0 1 2 -> 0 1 (1) 2 (2)
GROWN = LayerMap(
    (LayerOrigin((0,)), LayerOrigin((1,)), LayerOrigin((1, 2), True, 0.5), LayerOrigin((2,)), LayerOrigin((2,), True))
)


def _values(model_type: str, **changes: object) -> dict:
    values = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 32,
    }
    if model_type != "gpt_neox":
        values["num_key_value_heads"] = 2
    return values | changes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_from_plain_tensors_equals_the_librarys_own(model_type: str) -> None:
    config = hf_config(_values(model_type, pad_token_id=None))  # the library zeroes the row of a padding token
    state = initial_state(config, seed=1, dtype=torch.float32)
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ours = build_model(config, state).eval()
    tokens = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_batch_loss_equals_cross_entropy_on_the_full_logits(model_type: str) -> None:
    changes = {"logits_scaling": 3.0} if model_type == "granite" else {}
    config = hf_config(_values(model_type, **changes))
    model = build_model(config, initial_state(config, seed=0, dtype=torch.float32)).eval()
    # Larger logits, so that scales and soft caps are felt.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    tokens, labels = torch.randint(0, 64, (2, 12)), torch.randint(0, 64, (2, 12))
    labels[0, :5] = -100
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        actual = batch_loss(model, tokens, labels, num_valid=19, chunk_size=7)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_building_takes_the_tensors_over_without_a_copy() -> None:
    config = hf_config(_values("llama"))
    state = initial_state(config, seed=0, dtype=torch.bfloat16)
    model = build_model(config, state)
    own = plain_state(model)
    assert {name: t.data_ptr() for name, t in own.items()} == {name: t.data_ptr() for name, t in state.items()}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_layers_know_their_index() -> None:
    config = hf_config(_values("llama", num_hidden_layers=5))
    model = build_model(config, initial_state(config, seed=0, dtype=torch.float32))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]


def test_weights_that_do_not_fit_are_named() -> None:
    config = hf_config(_values("llama"))
    state = initial_state(config, seed=0, dtype=torch.float32)
    lacking = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        build_model(config, lacking)
    with pytest.raises(ConfigError, match="stray"):
        build_model(config, {**state, "stray": torch.zeros(1)})
    with pytest.raises(ConfigError, match="do not fit"):
        build_model(config, {**state, "model.norm.weight": torch.zeros(3)})


def test_initialisation_depends_on_the_seed_alone() -> None:
    config = hf_config(_values("qwen3"))
    first = initial_state(config, seed=3, dtype=torch.float32)
    torch.manual_seed(99)
    again, other = (initial_state(config, seed=seed, dtype=torch.float32) for seed in (3, 4))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_fresh_layers_differ_and_are_reproducible() -> None:
    config = hf_config(_values("gemma3_text"))
    fresh = fresh_layers(config, seed=0, dtype=torch.bfloat16)
    state = initial_state(config, seed=0, dtype=torch.bfloat16)
    names = {name.removeprefix("model.layers.0.") for name in state if name.startswith("model.layers.0.")}
    assert set(fresh(0)) == names
    assert torch.equal(fresh(1)["mlp.up_proj.weight"], fresh(1)["mlp.up_proj.weight"])
    assert not torch.equal(fresh(1)["mlp.up_proj.weight"], fresh(2)["mlp.up_proj.weight"])


@pytest.mark.parametrize("model_type", [*FAMILIES, "gpt2"])
def test_a_fresh_layer_has_the_initialisation_of_a_whole_models(model_type: str) -> None:
    """Names, shapes, means and deviations; GPT-2's output projections are drawn narrower in a deeper model."""
    if model_type == "gpt2":
        values = {"model_type": "gpt2", "n_embd": 32, "n_layer": 8, "n_head": 4, "vocab_size": 64}
    else:
        values = _values(model_type)
    config = hf_config(values | {"initializer_range": 0.07})
    whole = initial_state(config, seed=0, dtype=torch.float32)
    layer = fresh_layers(config, seed=0, dtype=torch.float32)(1)
    prefix = layer_prefix_of(whole) + ".1."
    expected = {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}
    assert {name: t.shape for name, t in layer.items()} == {name: t.shape for name, t in expected.items()}
    for name, tensor in layer.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, expected[name]), name
        else:
            torch.testing.assert_close(tensor.std(), expected[name].std(), rtol=0.1, atol=0)
            assert not torch.equal(tensor, expected[name]), name


def test_no_layer_is_built_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steplm.models.build.meta_model", lambda config: pytest.fail("a model was built"))
    fresh_layers(hf_config(_values("llama")), seed=0, dtype=torch.float32)


def test_a_configuration_survives_the_round_trip() -> None:
    config = hf_config(_values("gemma3_text", sliding_window=8))
    again = hf_config(config_values(config))
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (_values("lama"), "Did you mean 'llama'"),
        (_values("llama", rope_tetha=1e4), "has no key 'rope_tetha'"),
    ],
)
def test_a_configuration_that_transformers_does_not_know_is_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hf_config(values)
    assert words in str(caught.value)


def test_a_saved_folder_reads_back_equal_sharded_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf_config(_values("llama"))
    state = initial_state(config, seed=0, dtype=torch.float32)
    for size in ("5GB", "10KB"):
        monkeypatch.setattr("steplm.models.folder.MAX_SHARD_SIZE", size)
        folder = tmp_path / size
        save_folder(folder, config, state)
        _, read = load_config_and_state(folder)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert len(list((tmp_path / "10KB").glob("*.safetensors"))) > 1
    assert AutoConfig.from_pretrained(tmp_path / "5GB").num_hidden_layers == 3


def test_a_model_that_is_not_there_gets_a_clear_answer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        load_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_pretrained(tmp_path / "empty")
    with pytest.raises(HubUnavailable, match="not a local folder"):
        load_pretrained("nobody/nothing-of-this-name")


def test_a_rotary_base_written_in_the_old_way_is_felt() -> None:
    config = hf_config(_values("llama", rope_theta=5e5))
    assert config.rope_parameters["rope_theta"] == 5e5


def test_a_key_that_only_the_modelling_code_reads_is_taken_and_kept() -> None:
    """Qwen 2 has no default for ``head_dim``, and reads it where it is there."""
    config = hf_config(_values("qwen2", head_dim=16))
    again = hf_config(config_values(config))
    grown = grown_config(config, GROWN)
    for each in (config, again, grown):
        assert meta_model(each).model.layers[0].self_attn.q_proj.weight.shape == (64, 32)


def test_special_tokens_of_another_tokenizer_are_left_out() -> None:
    """Phi-3's padding token is 32000: no library would load such an embedding of 64 rows."""
    config = hf_config(_values("phi3"))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, None, None)
    assert hf_config(_values("phi3", vocab_size=40_000)).pad_token_id == 32_000
    with pytest.raises(ConfigError, match=r"model\.extra\.pad_token_id is 64, but the vocabulary ends at 63"):
        hf_config(_values("phi3", pad_token_id=64))


def test_a_key_of_ours_that_a_family_does_not_have_is_left_out_by_null() -> None:
    values = {key: value for key, value in _values("gpt2").items() if key != "num_key_value_heads"}
    with pytest.raises(ConfigError, match=r"no key 'intermediate_size'.*Set model\.extra\.intermediate_size=null"):
        hf_config(values)
    assert hf_config(values | {"intermediate_size": None, "n_inner": 48}).n_inner == 48


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text", "phi3"])
def test_no_token_is_a_padding_index_whatever_the_family_says(model_type: str) -> None:
    """Gemma's default is 0, which is the end of text of a tokenizer that is trained here."""
    config = hf_config(_values(model_type, vocab_size=64, pad_token_id=0))
    model = build_model(config, initial_state(config, seed=0, dtype=torch.float32))
    embeddings = model.get_input_embeddings()
    assert embeddings.padding_idx is None
    assert embeddings.weight.count_nonzero(dim=1).all()
    tokens = torch.arange(8).unsqueeze(0)
    batch_loss(model, tokens, tokens, num_valid=8, chunk_size=8).backward()
    assert embeddings.weight.grad[0].isfinite().all()
    assert embeddings.weight.grad[0].count_nonzero() > 0


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (_values("gemma3_text", num_hidden_layers=12, head_dim=8), "layer_types"),
        (_values("smollm3", num_hidden_layers=12), "no_rope_layers"),
        (_values("cohere2", num_hidden_layers=12), "layer_types"),
        (_values("qwen2", num_hidden_layers=12, use_sliding_window=True, max_window_layers=7), "layer_types"),
    ],
)
def test_a_stage_is_set_up_as_the_layers_of_the_final_model_that_it_becomes(values: dict[str, Any], key: str) -> None:
    final = hf_config(values)
    kept = [0, 1, 4, 5, 8, 11]
    stage = hf_config(values, kept)
    assert getattr(stage, key) == [getattr(final, key)[index] for index in kept]
    assert hf_config(values, range(12)).to_dict() == final.to_dict()


def test_types_of_attention_follow_in_gpt_neos_own_way_of_writing_them() -> None:
    values = {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 4, "num_heads": 4, "vocab_size": 64}
    config = hf_config(values | {"attention_types": [[["global", "local"], 2]]}, [1, 2, 3])
    assert config.attention_layers == ["local", "global", "local"]


def test_the_last_layer_with_experts_moves_up_with_growth() -> None:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
    config = hf_config(_values("ernie4_5_moe", moe_layer_start_index=0, **experts))
    grown = grown_config(config, GROWN)
    assert (config.moe_layer_end_index, grown.moe_layer_end_index) == (2, 4)
    layers = meta_model(grown).model.layers
    assert all(hasattr(layer.mlp, "experts") for layer in layers)


def test_layers_that_would_become_others_are_refused_by_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a family say which layers rotate their queries by a key that is not known here."""
    config = hf_config(_values("smollm3", num_hidden_layers=4))
    assert config.no_rope_layers == [1, 1, 1, 0]
    monkeypatch.setattr(
        "steplm.models.build.select_layers",
        lambda values, layers: select_layers(values, layers) | {"no_rope_layers": [1, 1]},
    )
    with pytest.raises(ConfigError, match=r"layer 1 would have self_attn\.use_rope 1, and layer 3, .* has 0"):
        with_layers(config, [0, 3])


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("bart", "is an encoder-decoder"),
        ("gemma3", "more than a language model.*Its text model is 'gemma3_text'"),
        ("musicgen", "more than a language model"),
    ],
)
def test_what_is_no_decoder_of_text_is_refused(model_type: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        hf_config({"model_type": model_type})


def test_only_an_exact_copy_of_the_function_passes_as_one() -> None:
    require_unchanged_function(hf_config(_values("llama")), "identity")
    require_unchanged_function(hf_config(_values("diffllama")), "random")  # declares nothing
    with pytest.raises(GrowthError, match=r"'identity' would change .* 'diffllama' model .* how deep they stand"):
        require_unchanged_function(hf_config(_values("diffllama")), "identity")


def test_a_configuration_that_cannot_be_run_is_refused_before_a_folder_grows() -> None:
    config = hf_config(_values("llama", num_attention_heads=2, num_key_value_heads=3, head_dim=8))
    with pytest.raises(ConfigError, match="cannot be run on a row of tokens"):
        require_unchanged_function(config, "identity")


def test_a_model_that_sees_what_it_predicts_is_refused() -> None:
    require_trainable(hf_config(_values("llama")))
    with pytest.raises(ConfigError, match=r"'bert' is not causal: .* \(is_decoder\)"):
        require_trainable(hf_config(_values("bert", num_key_value_heads=4)))
