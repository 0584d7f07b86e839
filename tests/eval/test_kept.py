"""Perplexities are kept between starts, and only what is of the same model, text and settings is taken again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.cli.evaluate import run_eval
from steplm.data import sources
from steplm.eval import kept
from steplm.eval.kept import evaluate_or_reuse
from steplm.eval.perplexity import PerplexityResult, evaluate_folder
from steplm.report.evaluations import find_evaluations

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"The small model grows {n}."}) + "\n" for n in range(20)))
    return path


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were scored, in order."""
    models: list[Path] = []

    def score(model: Path, *arguments: Any, **options: Any) -> PerplexityResult:
        models.append(Path(model))
        return evaluate_folder(model, *arguments, **options)

    monkeypatch.setattr(kept, "evaluate_folder", score)
    return models


def test_a_second_start_gives_the_same_numbers_and_scores_nothing(
    folder: Path, text: Path, scored: list[Path], tmp_path: Path
) -> None:
    results = [evaluate_or_reuse(folder, [str(text)], tmp_path / "out", device="cpu") for _ in range(2)]
    fresh = evaluate_folder(folder, [str(text)], device="cpu")
    assert results == [(fresh, False), (fresh, True)]
    copy = shutil.copy(text, tmp_path / "out/text.jsonl")
    options = {"device": "cpu", "batch_size": 1, "sequence_length": 64, "stride": 64}  # 64: the default, said
    assert evaluate_or_reuse(folder, [str(copy)], tmp_path / "out", **options) == (fresh, True)
    assert len(scored) == 1


def _other_text(model: Path, text: Path) -> dict[str, Any]:
    text.write_text(text.read_text().replace("grows 7", "grows 8"))
    return {}


def _other_model(model: Path, text: Path) -> dict[str, Any]:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return {}


def _other_length_of_training(model: Path, text: Path) -> dict[str, Any]:
    (model / "training_config.yaml").write_text("train:\n  sequence_length: 24\n")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _other_text,
        _other_model,
        _other_length_of_training,
        lambda model, text: {"sequence_length": 16},
        lambda model, text: {"stride": 8},
        lambda model, text: {"max_tokens": 50},
        lambda model, text: {"dtype": "bfloat16"},
    ],
)
def test_what_differs_in_model_text_or_settings_is_scored_anew(
    folder: Path, text: Path, scored: list[Path], tmp_path: Path, change: Callable[[Path, Path], dict[str, Any]]
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    evaluate_or_reuse(model, [str(text)], tmp_path / "out", device="cpu")
    options = change(model, text)
    result, reused = evaluate_or_reuse(model, [str(text)], tmp_path / "out", device="cpu", **options)
    assert not reused
    assert len(scored) == 2
    assert result == evaluate_folder(model, [str(text)], device="cpu", **options)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"schema": 1}'])
def test_a_damaged_file_is_scored_anew_and_mended(
    folder: Path, text: Path, scored: list[Path], tmp_path: Path, damage: str
) -> None:
    first, _ = evaluate_or_reuse(folder, [str(text)], tmp_path / "out", device="cpu")
    (file,) = (tmp_path / "out/texts").iterdir()
    whole = file.read_text()
    file.write_text(damage)
    assert evaluate_or_reuse(folder, [str(text)], tmp_path / "out", device="cpu") == (first, False)
    assert file.read_text() == whole


@pytest.mark.parametrize(
    ("address", "is_kept"), [("", False), ("?revision=main", False), (f"?revision={COMMIT}", True)]
)
def test_a_text_on_the_hub_is_kept_where_its_commit_is_given(
    folder: Path, scored: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, is_kept: bool
) -> None:
    monkeypatch.setattr(sources, "_stream_hub", lambda *_: iter([(1, {"text": "The small model grows."})]))
    entries = [f"hub://owner/name{address}"]
    results = [evaluate_or_reuse(folder, entries, tmp_path / "out", device="cpu") for _ in range(2)]
    assert [reused for _, reused in results] == [False, is_kept]
    assert len(scored) == (1 if is_kept else 2)


def test_the_command_keeps_perplexities_without_tasks_and_a_report_shows_them(
    folder: Path, text: Path, scored: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for _ in range(2):
        run_eval([str(folder)], [f"own={text}"], device="cpu", output=tmp_path / "out")
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    assert "as saved" not in shown[0].err
    assert shown[1].err.startswith(f"own  {folder}  perplexity ")
    assert "as saved" in shown[1].err
    assert len(scored) == 1
    (evaluation,) = find_evaluations(tmp_path / "out")
    assert evaluation.title == "Perplexity"
    assert evaluation.tables[0].rows[0][1].text == "own"
    rows = json.loads((tmp_path / "out/perplexity.json").read_text())
    assert [row["name"] for row in rows] == ["own"]
