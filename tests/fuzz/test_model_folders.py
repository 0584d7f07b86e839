"""Hugging Face folders in which a file, a tensor or a key of the configuration is not what was written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from steplm import grow
from steplm.data.tokenizer import train_tokenizer
from steplm.eval.chat import ChatModel
from steplm.eval.generate import generate
from steplm.eval.perplexity import evaluate_folder
from steplm.models.build import hf_config, initial_state
from steplm.models.folder import load_config_and_state, save_folder

fuzz = settings.get_profile("fuzz")
Claim = Callable[..., AbstractContextManager[None]]
Fresh = Callable[[], AbstractContextManager[Path]]
SpoilFile = Callable[[st.DataObject, Path], None]
SpoilJson = Callable[[st.DataObject, Any], Any]

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16,
}  # fmt: skip
EXPERTS = {
    "head_dim": 8, "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "first_k_dense_replace": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "glm4_moe": EXPERTS,
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 4},
    "shards": {"model_type": "qwen2"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, values in MODELS.items():
        config = hf_config({"model_type": name, **SMALL, **values})
        state = initial_state(config, seed=0, dtype=torch.float32)
        save_folder(root / name, config, state)
    folder = root / "shards"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {
        "model-00001-of-00002.safetensors": {},
        "model-00002-of-00002.safetensors": {},
    }
    for index, key in enumerate(sorted(weights)):
        shards[list(shards)[index % 2]][key] = weights[key]
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, held in shards.items() for key in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {name: root / name for name in MODELS}


def _spoil_tensors(data: st.DataObject, file: Path) -> None:
    """A tensor is gone, another name's, one more, of another shape or type, or not of numbers."""
    weights = load_file(file)
    key = data.draw(st.sampled_from(sorted(weights)), label="tensor")
    tensor = weights[key]
    match data.draw(
        st.sampled_from(["gone", "renamed", "all renamed", "more", "shape", "type", "nan"]), label="change"
    ):
        case "gone":
            del weights[key]
        case "renamed":
            other = data.draw(st.sampled_from([*sorted(weights), "lm_head.weight", "x", key.replace(".0.", ".1.")]))
            weights[other] = weights.pop(key)
        case "all renamed":
            prefix = data.draw(
                st.sampled_from(["_orig_mod.", "module.", "model.", "transformer.", "base_model.model."])
            )
            weights = {prefix + name: held for name, held in weights.items()}
        case "more":
            weights[data.draw(st.sampled_from([f"{key}_scale", key.replace(".0.", ".9."), "lm_head.weight"]))] = (
                tensor + 1
            )
        case "shape":
            change = data.draw(
                st.sampled_from([lambda t: t[:-1], lambda t: t[None], lambda t: t.flatten(), lambda t: t.T])
            )
            weights[key] = change(tensor).clone(memory_format=torch.contiguous_format)
        case "type":
            types = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
            weights[key] = tensor.to(data.draw(st.sampled_from(types), label="type"))
        case "nan":
            weights[key] = torch.full_like(tensor, data.draw(st.sampled_from([float("nan"), float("inf")])))
    save_file(weights, file, metadata={"format": "pt"})


def _spoil(data: st.DataObject, folder: Path, spoil_file: SpoilFile, spoil_json: SpoilJson) -> None:
    files = sorted(folder.iterdir())
    weights = [file for file in files if file.suffix == ".safetensors"]
    how = data.draw(
        st.sampled_from(["config", "config", "tensors", "tensors", "bytes", "subset", "pointer"]), label="how"
    )
    if how == "config":
        file = folder / "config.json"
        file.write_text(json.dumps(spoil_json(data, json.loads(file.read_text()))))
    elif how == "tensors":
        _spoil_tensors(data, data.draw(st.sampled_from(weights), label="file"))
    elif how == "bytes":
        spoil_file(data, data.draw(st.sampled_from(files), label="file"))
    elif how == "subset":
        for file in data.draw(st.sets(st.sampled_from(files), min_size=1), label="gone"):
            file.unlink()
    else:
        data.draw(st.sampled_from(weights), label="file").write_text("version https://git-lfs.github.com/spec/v1\n")


def _held(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def _without_prefix(key: str) -> str:
    """``model.`` may stand before a name any number of times: so do whole models and their bodies differ."""
    return re.sub(r"^(model\.)+", "", key)


def _equal(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right.to(left.dtype))


@fuzz
@given(data=st.data())
def test_a_spoiled_model_folder_is_loaded_whole_or_refused(
    data: st.DataObject,
    claim: Claim,
    fresh_folder: Fresh,
    models: dict[str, Path],
    spoil_file: SpoilFile,
    spoil_json: SpoilJson,
) -> None:
    """Whole: each tensor of the model is one of the file, and each of the file is in the model."""
    name = data.draw(st.sampled_from(list(MODELS)), label="model")
    with fresh_folder() as parent:
        folder = shutil.copytree(models[name], parent / "model")
        _spoil(data, folder, spoil_file, spoil_json)
        loaded = None
        with claim():
            loaded = load_config_and_state(folder)
        if loaded is not None:
            held = {_without_prefix(key): tensor for key, tensor in _held(folder).items()}
            state = {_without_prefix(key): tensor for key, tensor in loaded[1].items()}
            for key, tensor in state.items():
                assert _equal(tensor, held[key]), key
            assert held.keys() - state.keys() <= {"lm_head.weight"}, "tensors that nobody reads"


@fuzz
@given(data=st.data())
def test_a_spoiled_model_folder_grows_to_one_that_loads_or_is_refused(
    data: st.DataObject,
    claim: Claim,
    fresh_folder: Fresh,
    models: dict[str, Path],
    spoil_json: SpoilJson,
) -> None:
    """With a configuration of spoiled values; what is written holds the layers that it was made of."""
    name = data.draw(st.sampled_from(list(MODELS)), label="model")
    operator = data.draw(st.sampled_from(["identity", "stack", "interpolation_mean", "random"]), label="operator")
    with fresh_folder() as parent:
        folder = shutil.copytree(models[name], parent / "model")
        file = folder / "config.json"
        file.write_text(json.dumps(spoil_json(data, json.loads(file.read_text()))))
        depth = MODELS[name].get("num_hidden_layers", 2)
        with claim(parent):
            layer_map = grow(folder, to=depth + 1, output_dir=parent / "grown", operator=operator)
        assert sorted(os.listdir(parent)) in (["model"], ["grown", "model"]), "something half-written"
        if (parent / "grown").exists():
            config, state = load_config_and_state(parent / "grown")
            assert config.num_hidden_layers == depth + 1
            before = load_config_and_state(folder)[1]
            places = {layer_map.origins[place].parents[0]: place for place in layer_map.kept_layers}
            for key, tensor in before.items():
                place = re.sub(r"(?<=\.layers\.)\d+", lambda old: str(places[int(old[0])]), key)
                assert _equal(state[place], tensor), key


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, a chat template and a generation config."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    tokenizer = train_tokenizer(["the model grows"], 257)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = hf_config({"model_type": "llama", **SMALL, "vocab_size": 257})
    save_folder(folder, config, initial_state(config, seed=0, dtype=torch.float32))
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5], "repetition_penalty": 1.1}')
    return folder


@fuzz
@given(data=st.data())
def test_a_spoiled_chat_model_is_used_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, chat_model: Path, spoil_file: SpoilFile
) -> None:
    use = data.draw(st.sampled_from(["evaluate", "generate", "chat"]), label="use")
    with fresh_folder() as parent:
        folder = shutil.copytree(chat_model, parent / "model")
        (parent / "text.txt").write_text("the model")
        spoil_file(data, data.draw(st.sampled_from(sorted(folder.iterdir())), label="file"))
        with claim():
            if use == "evaluate":
                result = evaluate_folder(folder, [str(parent / "text.txt")], device="cpu", sequence_length=8)
                assert result.loss < 1e9  # a number
            elif use == "generate":
                generate(folder, "the", max_new_tokens=2, device="cpu")
            else:
                ChatModel(folder, device="cpu").reply([{"role": "user", "content": "a"}], max_new_tokens=2)
