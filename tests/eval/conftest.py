"""A tiny model with its tokenizer, in memory and as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steplm.data.tokenizer import train_tokenizer

TEXTS = ["The small model grows.", "New layers stand between old ones — and learn."] * 3


def tiny_model(vocab_size: int = 257, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from uniform: a wrong context or a wrong label shows
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS, 280)
    tiny_model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
