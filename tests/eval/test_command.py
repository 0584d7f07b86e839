"""``steplm eval``: the table for people, the JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steplm.cli.evaluate import run_eval
from steplm.data.tokenizer import train_tokenizer
from steplm.errors import ConfigError
from steplm.eval.perplexity import PerplexityResult, evaluate_folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "The small model grows."}\n{"text": ""}\n')
    return str(path)


def test_json_output_holds_the_numbers_of_every_model(
    folder: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval([str(folder), f"{folder}/"], [data], max_tokens="1k", device="cpu", json_output=True)
    expected = evaluate_folder(folder, [data], device="cpu")
    results = json.loads(capsys.readouterr().out)
    assert [result["model"] for result in results] == [str(folder), f"{folder}/"]
    for result in results:
        assert result["perplexity"] == expected.perplexity
        assert result["bits_per_byte"] == expected.bits_per_byte
        assert (result["num_tokens"], result["num_skipped_records"]) == (expected.num_tokens, 1)


def test_the_table_shows_perplexity_and_says_what_was_skipped(
    folder: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval([str(folder)], [data], device="cpu")
    output = capsys.readouterr().out
    assert f"{evaluate_folder(folder, [data], device='cpu').perplexity:.3f}" in output
    assert "1 empty or unusable records" in output


def test_models_with_different_tokenizers_are_told_to_be_compared_by_bytes(
    folder: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_tiny_model: Any
) -> None:
    other = save_tiny_model(tmp_path / "other", train_tokenizer(["The model grows, small."] * 3, 290))
    run_eval([str(folder), str(other)], [data], device="cpu")
    assert "note: perplexity: the models split this text into different tokens" in capsys.readouterr().err
    run_eval([str(folder), f"{folder}/"], [data], device="cpu")
    assert "note:" not in capsys.readouterr().err


def test_a_limit_of_tokens_ends_the_text_at_the_same_byte_for_every_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_tiny_model: Any
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The small model grows über alles."}\n' * 3)
    other = save_tiny_model(tmp_path / "other", train_tokenizer(["The small model grows."] * 3, 290))
    sizes = []
    for models in ([folder, other], [other, folder], [folder], [other]):
        run_eval([str(model) for model in models], [str(text)], device="cpu", max_tokens=30, json_output=True)
        sizes.append([row["num_text_bytes"] for row in json.loads(capsys.readouterr().out)])
    (first, second), (third, fourth), (alone,), (other_alone,) = sizes
    assert alone != other_alone, "30 tokens are different lengths of text"
    assert (first, second) == (alone, alone)
    assert (third, fourth) == (other_alone, other_alone)


@pytest.mark.parametrize(("max_tokens", "limit"), [(None, 10_000_000), ("5k", 5000)])
def test_hub_data_is_read_to_a_limit_that_is_stated(
    max_tokens: str | None, limit: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[int | None] = []

    def evaluated(model: str, data: list[str], **options: Any) -> PerplexityResult:
        limits.append(options["max_tokens"])
        return PerplexityResult(1.0, 1)

    monkeypatch.setattr("steplm.eval.perplexity.evaluate_folder", evaluated)
    run_eval(["owner/model"], ["hub://owner/name"], max_tokens=max_tokens)
    assert limits == [limit]
    assert ("10M tokens at most" in capsys.readouterr().err) == (max_tokens is None)


def test_a_token_limit_that_is_no_number_is_refused(folder: Path, data: str) -> None:
    with pytest.raises(ConfigError, match="max_tokens: cannot read 'many'"):
        run_eval([str(folder)], [data], max_tokens="many")


def test_a_named_text_is_a_row_of_its_own_and_the_others_are_one_text(
    folder: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.txt").write_text("The small model grows.")
    run_eval([str(folder)], [data, f"held_out={data}", "a=b.txt"], device="cpu", json_output=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["data"]) for row in rows] == [("", [data, "a=b.txt"]), ("held_out", [data])]
    assert rows[0]["num_text_bytes"] == rows[1]["num_text_bytes"] + 22
