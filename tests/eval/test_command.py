"""``steplm eval``: the table for people, the JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steplm.cli.evaluate import run_eval
from steplm.errors import ConfigError
from steplm.eval.perplexity import evaluate_folder


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


def test_a_token_limit_that_is_no_number_is_refused(folder: Path, data: str) -> None:
    with pytest.raises(ConfigError, match="max_tokens: cannot read 'many'"):
        run_eval([str(folder)], [data], max_tokens="many")
