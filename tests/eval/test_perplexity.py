"""Perplexity against known answers and against a plain transformers loop."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from steplm.errors import ConfigError, DataError
from steplm.eval.perplexity import (
    PerplexityResult,
    _batches,
    comparison_note,
    default_sequence_length,
    evaluate_folder,
    perplexity,
)


def test_a_note_says_what_of_two_models_can_be_compared() -> None:
    one, same, other = PerplexityResult(9.0, 10, 40), PerplexityResult(8.0, 10, 40), PerplexityResult(9.0, 14, 40)
    assert comparison_note([one]) is None
    assert comparison_note([one, same]) is None
    assert comparison_note([one, other]) == (
        "the models split this text into different tokens: compare bits per byte, not perplexity"
    )
    cut = comparison_note([one, PerplexityResult(9.0, 10, 1_500)])
    assert cut is not None
    assert "after 40 bytes for one model and 1,500 for another" in cut


@pytest.mark.parametrize("text", ["model: x\n", "- a\n", "train: {sequence_length: long}\n", "a: [\n", "\udcff"])
def test_a_training_config_of_another_program_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "training_config.yaml").write_bytes(text.encode(errors="surrogateescape"))
    assert default_sequence_length(tmp_path, LlamaConfig(max_position_embeddings=64)) == 64


def stream(num_tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 257, (num_tokens,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference_nll(model: PreTrainedModel, window: Tensor, num_scored: int) -> float:
    """Sum over the last ``num_scored`` tokens of a window, by the loss that transformers computes itself."""
    labels = window.clone()
    labels[: len(window) - num_scored] = -100
    return float(model(input_ids=window[None], labels=labels[None]).loss) * num_scored


def test_mean_nll_of_a_uniform_model_is_log_vocab_size(model: PreTrainedModel) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, stream(100), sequence_length=16, num_text_bytes=50)
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(99 * math.log2(257) / 50, rel=1e-6)


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_every_token_but_the_first_is_scored_once_after_its_predecessor(
    num_tokens: int, sequence_length: int, stride: int, batch_size: int
) -> None:
    tokens = torch.arange(num_tokens)  # each token names its place
    stride = min(stride, sequence_length)
    scored: list[int] = []
    for batch in _batches(tokens, sequence_length, stride, batch_size):
        valid = batch.labels != -100
        assert torch.equal(batch.input_ids[valid], batch.labels[valid] - 1)
        scored += batch.labels[valid].tolist()
        for row, mask in zip(batch.input_ids, valid, strict=True):
            reach = int(mask.nonzero().max()) + 1
            assert torch.equal(row[:reach], torch.arange(reach) + row[0])  # the whole context, in order
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 50])
def test_perplexity_equals_a_plain_transformers_loop(model: PreTrainedModel, num_tokens: int) -> None:
    tokens, length = stream(num_tokens), 8
    windows = [tokens[start : start + length + 1] for start in range(0, num_tokens - 1, length)]
    expected = sum(reference_nll(model, window, len(window) - 1) for window in windows)
    result = perplexity(model, tokens, sequence_length=length, batch_size=3)
    assert result.num_tokens == num_tokens - 1
    assert result.nll_sum == pytest.approx(expected, rel=1e-5)


def test_a_sliding_window_equals_scoring_each_token_with_its_context(model: PreTrainedModel) -> None:
    tokens, length, stride = stream(30), 8, 3
    expected = 0.0
    for label in range(1, 30):
        # The window that first reaches this label: 0, stride, 2 · stride, …
        start = stride * max(0, math.ceil((label - length) / stride))
        expected += reference_nll(model, tokens[start : label + 1], 1)
    result = perplexity(model, tokens, sequence_length=length, stride=stride)
    assert result.num_tokens == 29
    assert result.nll_sum == pytest.approx(expected, rel=1e-5)


def test_batch_size_does_not_change_the_result(model: PreTrainedModel) -> None:
    results = [perplexity(model, stream(77), sequence_length=9, batch_size=size).nll_sum for size in (1, 2, 7, 100)]
    assert results == pytest.approx([results[0]] * 4, rel=1e-6)


def test_a_stride_of_the_whole_window_is_the_default(model: PreTrainedModel) -> None:
    whole = perplexity(model, stream(77), sequence_length=9, stride=9)
    assert whole == perplexity(model, stream(77).tolist(), sequence_length=9)


def test_evaluation_leaves_the_model_in_its_mode_and_without_gradients(model: PreTrainedModel) -> None:
    model.train()
    perplexity(model, stream(20), sequence_length=8)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "options", "error", "words"),
    [
        (stream(20), {"sequence_length": 8, "stride": 9}, ConfigError, "stride is 9"),
        (stream(20), {"sequence_length": 8, "stride": 0}, ConfigError, "stride is 0"),
        (stream(20), {"sequence_length": 65}, ConfigError, "64 positions"),
        (stream(1), {"sequence_length": 8}, DataError, "at least 2 tokens, there are 1"),
        (torch.tensor([0, 257]), {"sequence_length": 8}, DataError, "token 257"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(
    model: PreTrainedModel, tokens: Tensor, options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        perplexity(model, tokens, **options)


def test_without_text_there_are_no_bits_per_byte() -> None:
    assert PerplexityResult(10.0, 5).bits_per_byte is None


# --- folders --------------------------------------------------------------------------------


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_folder_is_scored_with_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    texts = ["The small model grows.", "Old ones — and new ones."]
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    result = evaluate_folder(folder, [str(data)], sequence_length=64, device="cpu")

    from steplm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    eos = tokenizer.eos_token_id
    ids = [eos]
    for text in texts:
        ids += [*tokenizer(text).input_ids, eos]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(ids) <= 65, "one window, so that the reference is one forward pass"
    expected = reference_nll(model, torch.tensor(ids), len(ids) - 1)
    assert result.num_tokens == len(ids) - 1
    assert result.nll_sum == pytest.approx(expected, rel=1e-5)
    assert result.num_text_bytes == sum(len(text.encode()) for text in texts)


def test_max_tokens_are_the_tokens_that_are_predicted(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ["The small model grows."] * 20)
    result = evaluate_folder(folder, [str(data)], sequence_length=16, max_tokens=37, device="cpu")
    assert result.num_tokens == 37


def test_skipped_records_are_counted(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ["The small model grows.", "", " "])
    assert evaluate_folder(folder, [str(data)], sequence_length=16, device="cpu").num_skipped_records == 2


def test_the_default_length_is_the_one_of_training_where_the_folder_says_so(
    folder: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    assert default_sequence_length(folder, model.config) == 64
    exported = shutil.copytree(folder, tmp_path / "exported")
    (exported / "training_config.yaml").write_text("train:\n  sequence_length: 24\n")
    assert default_sequence_length(exported, model.config) == 24
    model.config.max_position_embeddings = 10**6
    assert default_sequence_length(folder, model.config) == 1024
