"""A model folder in which one file says something else: it is refused in one line, by each command that uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steplm.errors import CheckpointError, ConfigError, DataError, SteplmError
from steplm.eval.chat import ChatModel
from steplm.eval.generate import generate
from steplm.eval.perplexity import evaluate_folder
from steplm.eval.zero_shot import _load_scorer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def _evaluate(folder: Path) -> None:
    (folder.parent / "text.txt").write_text("The small model grows.")
    evaluate_folder(folder, [str(folder.parent / "text.txt")], device="cpu")


def _generate(folder: Path) -> None:
    generate(folder, "The", max_new_tokens=3, device="cpu")


def _chat(folder: Path) -> None:
    ChatModel(folder, device="cpu").reply([{"role": "user", "content": "Grow."}], max_new_tokens=3)


COMMANDS = (_evaluate, _generate, _chat)
KINDS: dict[str, tuple[str, dict[str, Any], tuple[Callable[[Path], None], ...], type[SteplmError], str]] = {
    "a setting that fails where it is used": (
        "config.json", {"return_dict": False}, COMMANDS, ConfigError, "cannot be run|cannot generate",
    ),
    "an end token outside the vocabulary": (
        "tokenizer_config.json", {"eos_token": "<other>"}, COMMANDS, DataError, "vocabulary ends at 279",
    ),
    "a length of the tokenizer that is a text": (
        "tokenizer_config.json", {"model_max_length": "long"}, COMMANDS, DataError, "cannot read the tokenizer",
    ),
    "an end token that is a text": (
        "generation_config.json", {"eos_token_id": "a"}, COMMANDS, CheckpointError, "eos_token_id='a'",
    ),
    "end tokens that are none": (
        "generation_config.json", {"eos_token_id": [0, {"a": 1}]}, COMMANDS, CheckpointError, "eos_token_id=",
    ),
    "a penalty that is a text": (
        "generation_config.json", {"repetition_penalty": "x"}, (_generate, _chat), ConfigError, "cannot generate",
    ),
    "a dtype that is a number": ("config.json", {"dtype": 1}, COMMANDS, CheckpointError, "has dtype=1"),
    "a dtype of integers": ("config.json", {"dtype": "int8"}, COMMANDS, CheckpointError, "has dtype=torch.int8"),
    "a template that renders nothing": (
        "tokenizer_config.json", {"chat_template": "{# nothing #}"}, (_chat,), ConfigError, "renders nothing",
    ),
}  # fmt: skip


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    _change(copy / "tokenizer_config.json", chat_template=TEMPLATE)
    return copy


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_folder_is_otherwise_usable(copy: Path) -> None:
    for use in COMMANDS:
        use(copy)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_with_the_reason(kind: str, copy: Path) -> None:
    file, values, commands, error, words = KINDS[kind]
    _change(copy / file, **values)
    for use in commands:
        with pytest.raises(error, match=words) as raised:
            use(copy)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("use", COMMANDS)
def test_finite_weights_that_overflow_are_no_perplexity_and_no_answer(use: Callable[[Path], None], copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"] = torch.full_like(
        weights["model.layers.0.self_attn.v_proj.weight"], 3e38
    )
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, ConfigError), match="logits that are NaN"):
        use(copy)


def _score(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    _load_scorer(str(folder), 1, "cpu", "auto")


@pytest.mark.parametrize("use", [*COMMANDS, _score])
def test_a_model_that_sees_what_it_is_to_predict_gets_no_perplexity_and_no_answer(
    use: Callable[[Path], None], copy: Path
) -> None:
    """Its perplexity would be far too low: encoders, and decoders whose configuration turns the causal mask off."""
    _change(copy / "config.json", is_causal=False)
    with pytest.raises(ConfigError, match="'llama' is not causal"):
        use(copy)
