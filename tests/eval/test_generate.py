"""Samples: what the numbers mean, and that the seed decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steplm.cli.app import generate as command
from steplm.data.tokenizer import load_tokenizer
from steplm.errors import CheckpointError, ConfigError
from steplm.eval.generate import generate

PROMPT = "The small"


def test_the_same_seed_gives_the_same_text_and_another_seed_another(folder: Path) -> None:
    texts = [generate(folder, PROMPT, max_new_tokens=20, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_zero_takes_the_likeliest_token_each_time(folder: Path) -> None:
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [tokenizer.eos_token_id, *tokenizer(PROMPT).input_ids]  # as a document begins in training
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert PROMPT + generate(folder, PROMPT, max_new_tokens=12, temperature=0, seed=5) == expected


def test_generation_leaves_the_global_random_state_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    generate(folder, PROMPT, max_new_tokens=3, seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_an_empty_prompt_begins_a_document(folder: Path) -> None:
    assert generate(folder, "", max_new_tokens=10, seed=0)


def test_a_prompt_with_half_a_character_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not valid Unicode"):
        generate(folder, "caf\udce9")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_new_tokens": 64}, "64 positions"),
    ],
)
def test_numbers_out_of_range_are_refused(folder: Path, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(folder, PROMPT, **options)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        generate(tmp_path, PROMPT)


def test_the_command_prints_prompt_and_continuation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(str(folder), PROMPT, max_new_tokens=8, temperature=0)
    assert capsys.readouterr().out == PROMPT + generate(folder, PROMPT, max_new_tokens=8, temperature=0) + "\n"
