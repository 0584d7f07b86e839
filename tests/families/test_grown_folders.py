"""``steplm grow`` on folders as they are found: what is written is the whole model, with all that belongs to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from steplm import grow
from steplm.data.tokenizer import load_tokenizer, train_tokenizer
from steplm.errors import ConfigError, GrowthError
from steplm.models.build import hf_config, initial_state
from steplm.models.folder import load_pretrained, save_folder

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERTS = {
    "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 0,
}  # fmt: skip


def save_model(folder: Path, model_type: str, **values: Any) -> Path:
    """Random tensors, far from uniform logits, with a tokenizer, a chat template and two tokens that end an answer."""
    config = hf_config({"model_type": model_type, **SMALL, **values})
    state = initial_state(config, seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    save_folder(
        folder, config, {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in state.items()}
    )
    tokenizer = train_tokenizer(["the model grows new layers between old ones"] * 3, 280)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 5], pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("qwen2", {"head_dim": 16}),
        ("phi3", {"head_dim": 16}),
        ("qwen3_moe", EXPERTS),
        ("glm4_moe", SHARED_EXPERTS),
        ("gemma3_text", {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 4}),
        ("smollm3", {"num_hidden_layers": 6}),
    ],
)
def test_identity_leaves_every_logit_of_a_folder_as_it_was(
    tmp_path: Path, model_type: str, values: dict[str, Any]
) -> None:
    model = save_model(tmp_path / "model", model_type, **values)
    depth = SMALL["num_hidden_layers"] if "num_hidden_layers" not in values else values["num_hidden_layers"]
    grow(model, to=depth + 2, output_dir=tmp_path / "grown", operator="identity")
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits for folder in (model, tmp_path / "grown")
        )
    assert torch.equal(before, after)


@pytest.mark.parametrize("operator", ["interpolation", "interpolation_mean", "stack", "random"])
def test_a_routers_bias_grows_with_its_layer(tmp_path: Path, operator: str) -> None:
    model = save_model(tmp_path / "model", "glm4_moe", **SHARED_EXPERTS)
    layer_map = grow(model, to=5, output_dir=tmp_path / "grown", operator=operator)
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    old, new = load_pretrained(model).state_dict(), load_pretrained(tmp_path / "grown").state_dict()
    for index, origin in enumerate(layer_map.origins):
        if not origin.is_new:
            assert torch.equal(new[name.format(index)], old[name.format(origin.parents[0])])
        elif operator == "random":
            assert new[name.format(index)].count_nonzero() == 0
        else:
            assert new[name.format(index)].count_nonzero() == 4


def test_generation_defaults_chat_template_and_tokenizer_travel_along(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    grow(model, to=4, output_dir=tmp_path / "grown")
    grown = tmp_path / "grown"
    assert json.loads((grown / "generation_config.json").read_text())["eos_token_id"] == [0, 5]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (grown / name).read_bytes() == (model / name).read_bytes()
    assert load_tokenizer(grown)("grows").input_ids == load_tokenizer(model)("grows").input_ids


def test_a_layer_that_needs_no_fresh_one_builds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr("steplm.models.build.with_tiny_vocabulary", lambda *_: pytest.fail("a layer was built"))
    grow(model, to=4, output_dir=tmp_path / "grown", operator="interpolation_mean")


def test_what_identity_cannot_promise_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "diffllama")
    with pytest.raises(GrowthError, match="would change what a 'diffllama' model computes"):
        grow(model, to=4, output_dir=tmp_path / "grown", operator="identity")
    assert not (tmp_path / "grown").exists()


def test_an_encoder_decoder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", "d_model": 16, "vocab_size": 32}))
    with pytest.raises(ConfigError, match="'bart' is an encoder-decoder"):
        grow(tmp_path, to=4, output_dir=tmp_path / "grown")


def test_a_growth_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr("steplm.training.grow_folder.provenance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grow(model, to=4, output_dir=tmp_path / "grown")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
