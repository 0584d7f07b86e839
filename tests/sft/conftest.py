"""A tiny model folder whose tokenizer knows Alpaca's words, and a file of records of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder without a chat template, in bf16, with two layers and 128 positions."""
    path = tmp_path_factory.mktemp("tiny") / "export"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,  # far from uniform: a wrong context or a wrong label shows
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(RECORDS))
    return path
