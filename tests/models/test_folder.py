"""A model folder is what its configuration says: every tensor of it, none besides, and what belongs to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from steplm import grow
from steplm.errors import CheckpointError, ConfigError
from steplm.eval.fingerprint import model_fingerprint
from steplm.models.build import build_model, hf_config, initial_state, plain_state, saved_buffers
from steplm.models.folder import copy_companions, load_config_and_state, load_pretrained, save_folder, weight_files

Weights = dict[str, Tensor]
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
GLM = LLAMA | {
    "model_type": "glm4_moe", "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 0,
}  # fmt: skip
ROUTER_BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = hf_config(LLAMA)
    save_folder(tmp_path / "model", config, initial_state(config, seed=0, dtype=torch.float32))
    return tmp_path / "model"


def change(folder: Path, function: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(function(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("load", [load_pretrained, load_config_and_state])
def test_a_missing_tensor_is_named(folder: Path, load: Callable[[Path], Any]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change(folder, lambda weights: {key: tensor for key, tensor in weights.items() if key != name})
    with pytest.raises(
        CheckpointError, match=r"not those of its config\.json: 1 missing \(model\.layers\.1\.mlp\.down"
    ):
        load(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    change(folder, lambda weights: weights | {"model.layers.7.mlp.down_proj.weight": torch.zeros(32, 48)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(model\.layers\.7\.mlp\.down_proj\.weight\)"):
        load_pretrained(folder)


@pytest.mark.parametrize(("prefix", "wrapper"), [("_orig_mod.", "torch.compile"), ("module.", "DataParallel")])
def test_the_prefix_of_a_wrapper_is_told(folder: Path, prefix: str, wrapper: str) -> None:
    change(folder, lambda weights: {f"{prefix}{name}": tensor.clone() for name, tensor in weights.items()})
    with pytest.raises(CheckpointError, match=f"named '{prefix}'.*{wrapper} does.*Remove this prefix"):
        load_pretrained(folder)


def test_what_is_written_is_checked_before_it_counts(tmp_path: Path) -> None:
    config = hf_config(LLAMA)
    state = initial_state(config, seed=0, dtype=torch.float32)
    lacking = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    for wrong, words in (
        (lacking, r"1 missing \(model\.norm\.weight\)"),
        (state | {"stray": torch.zeros(1)}, r"1 unexpected \(stray\)"),
        (state | {"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight is \[3\], .* says \[32\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            save_folder(tmp_path / "model", config, wrong)
        assert weight_files(tmp_path / "model") == []


def with_biases(config: PretrainedConfig) -> Weights:
    state = initial_state(config, seed=0, dtype=torch.bfloat16)
    for layer in range(config.num_hidden_layers):
        state[ROUTER_BIAS.format(layer)] = torch.tensor([5.0, -5.0, 5.0, float(layer)])
    return state


def test_a_routers_bias_is_a_part_of_the_model_wherever_it_goes(tmp_path: Path) -> None:
    """It is no parameter, and in fp32 beside weights in bf16; it decides which experts are chosen."""
    config = hf_config(GLM)
    state = with_biases(config)
    model = build_model(config, state)
    assert all(torch.equal(plain_state(model)[name], tensor) for name, tensor in state.items())
    save_folder(tmp_path, config, plain_state(model))
    _, read = load_config_and_state(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for layer in range(3):
        name = ROUTER_BIAS.format(layer)
        assert torch.equal(read[name].float(), state[name])
        assert torch.equal(theirs[name].float(), state[name])
    lacking = {name: tensor for name, tensor in state.items() if name != ROUTER_BIAS.format(1)}
    with pytest.raises(ConfigError, match=r"missing \(model\.layers\.1\.mlp\.gate\.e_score_correction_bias\)"):
        build_model(config, lacking)


def test_buffers_that_a_model_computes_are_not_saved() -> None:
    config = hf_config(LLAMA)
    model = build_model(config, initial_state(config, seed=0, dtype=torch.float32))
    assert [name for name, _ in model.named_buffers()]
    assert saved_buffers(model) == {}


def test_a_loaded_model_trains_every_row_of_its_embeddings(folder: Path) -> None:
    """A folder's padding token is often its end-of-text; torch gives a padding index no gradient."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    model = load_pretrained(folder)
    tokens = torch.arange(8).unsqueeze(0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.get_input_embeddings().weight.grad[:7].count_nonzero(dim=1).all()
    assert model.config.pad_token_id == 0


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.safetensors"])
def test_the_fingerprint_covers_weights_of_every_format(folder: Path, file_name: str, shared_tokenizer: Path) -> None:
    shutil.copytree(shared_tokenizer, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / file_name)
    before = model_fingerprint(str(folder))
    data = bytearray((folder / file_name).read_bytes())
    data[-1] ^= 1
    (folder / file_name).write_bytes(bytes(data))
    assert model_fingerprint(str(folder)) != before


@pytest.fixture
def shared_tokenizer(tmp_path: Path) -> Path:
    from steplm.data.tokenizer import train_tokenizer

    train_tokenizer(["some text"], 257).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_what_belongs_to_a_model_travels_as_it_is_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    companions = {
        "tokenizer.json": "{ }", "tokenizer.model": "pieces", "tokenizer_config.json": "{  }", "vocab.json": "{}",
        "merges.txt": "a b", "special_tokens_map.json": "{}", "added_tokens.json": "{}", "chat_template.jinja": "hi",
        "additional_chat_templates/tools.jinja": "tools", "generation_config.json": '{"eos_token_id": [1, 2]}',
    }  # fmt: skip
    for name, text in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "README.md").write_text("another model's card")
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(folder, target)
    copied = {str(file.relative_to(target)): file.read_text() for file in target.rglob("*") if file.is_file()}
    assert copied == companions


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda weights: weights | {DOWN: weights[DOWN].T.contiguous()},
            r"down_proj\.weight is \[48, 32\], not \[32, 48\]",
        ),
        (
            lambda weights: weights | {DOWN: (weights[DOWN] * 99).to(torch.int8)},
            r"down_proj\.weight as int8",
        ),
        (lambda weights: weights | {DOWN: weights[DOWN] / 0}, r"not all numbers: model\.layers\.1\.mlp\.down_proj"),
    ],
)
def test_what_a_parameter_cannot_hold_is_refused_by_name(
    folder: Path, spoil: Callable[[Weights], Weights], message: str
) -> None:
    change(folder, spoil)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def set_keys(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_tied_head_may_be_saved_again_but_not_with_other_values(folder: Path) -> None:
    set_keys(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"ties the head to the embeddings .* other values"):
        load_pretrained(folder)
    change(folder, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert "lm_head.weight" not in load_config_and_state(folder)[1]


def test_a_depth_that_no_memory_holds_is_refused_before_it_is_built(folder: Path) -> None:
    set_keys(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=1,000,000,000, and the weights hold 30 tensors"):
        load_config_and_state(folder)


def test_a_dropout_that_is_no_probability_is_refused_before_training(folder: Path) -> None:
    set_keys(folder, attention_dropout=7)
    with pytest.raises(CheckpointError, match="attention_dropout is 7, but must be from 0 to 1"):
        load_config_and_state(folder)
    with pytest.raises(ConfigError, match=r"attention_dropout is -0\.1"):
        hf_config(LLAMA | {"attention_dropout": -0.1})


@pytest.mark.parametrize("key", ["output_attentions", "output_hidden_states"])
def test_outputs_that_nobody_reads_are_turned_off(folder: Path, tmp_path: Path, key: str) -> None:
    set_keys(folder, **{key: True})
    assert getattr(load_pretrained(folder).config, key) is False
    grow(folder, to=4, output_dir=tmp_path / "grown")
    assert getattr(hf_config(LLAMA | {key: True}), key) is False


def test_an_infinite_value_of_the_configuration_is_saved_and_read_again(folder: Path, tmp_path: Path) -> None:
    set_keys(folder, rms_norm_eps=float("inf"))
    grow(folder, to=4, output_dir=tmp_path / "grown")
    assert load_config_and_state(tmp_path / "grown")[0].rms_norm_eps == float("inf")


def test_an_error_of_transformers_can_be_printed(folder: Path) -> None:
    set_keys(folder, attn_implementation="\ud800")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    str(caught.value).encode()


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match="two sets of weights"):
        load_pretrained(folder)


def test_an_adapter_is_not_taken_for_a_model_nor_merged_without_a_word(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter beside the model"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json, but an adapter"):
        load_pretrained(folder)


def test_a_pointer_of_git_lfs_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a pointer of Git LFS.* git lfs pull"):
        load_pretrained(folder)


def test_quantized_weights_are_neither_trained_nor_grown(folder: Path, tmp_path: Path) -> None:
    set_keys(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    for use in (load_config_and_state, lambda path: grow(path, to=4, output_dir=tmp_path / "grown")):
        with pytest.raises(ConfigError, match=r"are quantized \(fp8\)"):
            use(folder)


def test_all_of_an_error_of_transformers_is_told_in_one_line(folder: Path) -> None:
    set_keys(folder, rms_norm_eps="small")
    with pytest.raises(CheckpointError, match=r"rms_norm_eps.* expected float, got str") as raised:
        load_pretrained(folder)
    assert "\n" not in str(raised.value)


def in_two_shards(folder: Path, repeated: Weights) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file(weights, folder / names[0], metadata={"format": "pt"})
    save_file(repeated, folder / names[1], metadata={"format": "pt"})
    where = dict.fromkeys(weights, names[0]) | {"model.norm.weight": names[1]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_tensor_in_two_shards_has_one_value(folder: Path) -> None:
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    in_two_shards(folder, {"model.norm.weight": norm})
    load_pretrained(folder)
    save_file({"model.norm.weight": norm + 1}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"hold different values of model\.norm\.weight"):
        load_pretrained(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_floating_point_number_is_no_weight_in_any_format(
    folder: Path, kind: torch.dtype, file: str
) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights[DOWN] = (weights[DOWN] * 99).to(kind)
    set_keys(folder, quantization_config={"quant_method": "unheard-of"})
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{DOWN} as {kind}|unknown dtype".replace("torch.", "")):
        load_pretrained(folder)


def test_integer_experts_are_refused_under_the_names_of_their_file(tmp_path: Path) -> None:
    config = hf_config({**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1})
    build_model(config, initial_state(config, seed=0, dtype=torch.float32)).save_pretrained(tmp_path)
    load_pretrained(tmp_path)
    change(
        tmp_path,
        lambda weights: {
            key: (99 * tensor).to(torch.int8) if ".experts." in key else tensor for key, tensor in weights.items()
        },
    )
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight as int8"):
        load_pretrained(tmp_path)


def test_a_router_bias_that_is_no_number_is_refused(tmp_path: Path) -> None:
    config = hf_config(GLM)
    save_folder(tmp_path, config, initial_state(config, seed=0, dtype=torch.float32))
    name = ROUTER_BIAS.format(0)
    change(tmp_path, lambda weights: weights | {name: weights[name] / 0})
    with pytest.raises(CheckpointError, match=name):
        load_pretrained(tmp_path)


def test_a_damaged_generation_config_is_refused_since_it_may_name_the_end_of_a_turn(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]')
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
        load_pretrained(folder)
