"""A tiny model folder whose tokenizer knows Alpaca's words, and a file of records of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from steplm.data.tokenizer import load_tokenizer, train_tokenizer

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ANIMALS = ("cat", "dog", "owl", "bee", "hen", "fox")
RECORDS = [
    {"instruction": f"Say {animal} {count} times.", "input": "", "output": f" {animal}" * count}
    for count in (1, 2, 3)
    for animal in ANIMALS
] + [{"instruction": "Repeat the input.", "input": f"a {animal}", "output": f"a {animal}"} for animal in ANIMALS]


def make_tokenizer() -> PreTrainedTokenizerFast:
    texts = [WITHOUT_INPUT, WITH_INPUT, *(f"{record['instruction']} {record['output']}" for record in RECORDS)]
    return train_tokenizer(texts * 3, 420)


@pytest.fixture(scope="session")
def folder(save_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder without a chat template, in bf16, with two layers and 128 positions."""
    tokenizer = make_tokenizer()
    return save_tiny_model(
        tmp_path_factory.mktemp("tiny") / "export",
        tokenizer,
        dtype="bfloat16",
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(RECORDS))
    return path
