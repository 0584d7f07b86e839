from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from steplm.errors import CheckpointError, ConfigError, HubUnavailable
from steplm.growth.grow import layer_prefix_of
from steplm.models.build import (
    build_model,
    config_values,
    fresh_layers,
    hf_config,
    initial_state,
    plain_state,
)
from steplm.models.folder import load_config_and_state, load_pretrained, save_folder
from steplm.models.forward import batch_loss

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
    with pytest.raises(HubUnavailable, match="no local folder"):
        load_pretrained("nobody/nothing-of-this-name")


def test_a_rotary_base_written_in_the_old_way_is_felt() -> None:
    config = hf_config(_values("llama", rope_theta=5e5))
    assert config.rope_parameters["rope_theta"] == 5e5
