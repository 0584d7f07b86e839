"""A run ends in the model that its configuration describes, in however many stages, with every tensor of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steplm.config import RunConfig
from steplm.data.tokenizer import train_tokenizer
from steplm.errors import ConfigError, GrowthError
from steplm.models.build import hf_config, initial_state
from steplm.models.folder import save_folder
from steplm.training.run import train

Configure = Callable[..., RunConfig]
TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
GEMMA = {"head_dim": 8, "sliding_window": 4, "layer_types": TYPES}
EXPERTS = {
    "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
}  # fmt: skip
ROUTER_BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("layers", [[6], [4, 2]])
def test_layers_are_of_the_types_that_the_final_model_was_to_have(
    tiny_run: Configure, tmp_path: Path, layers: list[int]
) -> None:
    config = tiny_run(
        tmp_path / "run", "model.model_type=gemma3_text", "model.num_hidden_layers=6",
        f"model.extra={json.dumps(GEMMA)}", f"plan.num_stages={len(layers)}", f"plan.layers={layers}",
    )  # fmt: skip
    assert train(config).finished
    assert json.loads((tmp_path / "run/export/config.json").read_text())["layer_types"] == TYPES


def test_a_routers_bias_is_carried_through_stages_checkpoints_and_export(tiny_run: Configure, tmp_path: Path) -> None:
    model = tmp_path / "model"
    given = tiny_run(tmp_path / "run", "model.model_type=glm4_moe", f"model.extra={json.dumps(EXPERTS)}")
    config = hf_config(given.model.hf_config(), 3)
    state = initial_state(config, seed=0, dtype=torch.float32)
    for layer in range(3):
        state[ROUTER_BIAS.format(layer)] = torch.tensor([5.0, -5.0, float(layer), 5.0])
    save_folder(model, config, state)
    train_tokenizer(["the model grows"], 270).save_pretrained(model)
    run = tiny_run(
        tmp_path / "run", "model.model_type=glm4_moe", f"model.extra={json.dumps(EXPERTS)}", f"init_from={model}",
        f"data.tokenizer={model}", f"data.prepared_dir={tmp_path / 'prepared'}", "plan.layers=[3, 1]",
        "growth.operator=interpolation",
    )  # fmt: skip
    assert train(run).finished
    exported = load_file(tmp_path / "run/export/model.safetensors")
    biases = [exported[ROUTER_BIAS.format(layer)].tolist()[2] for layer in range(4)]
    assert sorted(set(biases)) == [0.0, 1.0, 2.0]
    assert biases == sorted(biases)


@pytest.mark.parametrize(
    ("model_type", "error", "words"),
    [("diffllama", GrowthError, "'identity' would change what a 'diffllama'"), ("bert", ConfigError, "is not causal")],
)
def test_a_family_that_cannot_do_it_is_refused_before_any_data_are_read(
    tiny_run: Configure, tmp_path: Path, model_type: str, error: type[Exception], words: str
) -> None:
    config = tiny_run(
        tmp_path / "run", f"model.model_type={model_type}", "model.num_key_value_heads=4", "growth.operator=identity",
        f"data.prepared_dir={tmp_path / 'prepared'}",
    )  # fmt: skip
    with pytest.raises(error, match=words):
        train(config)
    assert not (tmp_path / "prepared").exists()


def test_no_embedding_stays_zero_where_the_padding_token_is_the_end_of_text(
    tiny_run: Configure, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path / "run", "model.model_type=phi3", "model.extra={pad_token_id: 0}")
    assert train(config).finished
    embeddings = load_file(tmp_path / "run/export/model.safetensors")["model.embed_tokens.weight"]
    assert embeddings.count_nonzero(dim=1).all()
