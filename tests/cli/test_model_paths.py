from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from steplm.cli.model_paths import find_model, require_hub
from steplm.errors import CheckpointError


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/x/export", "runs/x-sft/export", "runs/begun/checkpoints", "plain"):
        Path(folder).mkdir(parents=True)
    for folder in ("runs/x/export", "runs/x-sft/export", "plain"):
        (Path(folder) / "config.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("runs/x", "runs/x/export"),
        ("./runs/x-sft/", "runs/x-sft/export"),
        ("./plain/", "./plain/"),
        ("runs/x/export", "runs/x/export"),
        ("plain", "plain"),
        ("owner/name", "owner/name"),
    ],
)
def test_a_run_stands_for_its_export_and_other_names_for_themselves(runs: Path, name: str, found: str) -> None:
    assert find_model(name) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/y-sft", r"^no folder runs/y-sft\. Did you mean runs/x-sft\?$"),
        ("runs/x/exprt", r"Did you mean runs/x/export\?$"),
        ("rnus/x/export", r"^no folder rnus/x/export\. Did you mean runs\?$"),
        ("./nothing/like/it", r"^no folder ./nothing/like/it\.$"),
        ("runs/begun", r"is a run that has no export yet: start its command again"),
        ("plian", r"^no folder plian\. Did you mean plain\?$"),
        ("plain/config.json", r"^no folder plain/config\.json\."),
    ],
)
def test_a_path_with_no_model_is_told_at_once(runs: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_model(name)


def test_where_the_hub_does_not_answer_its_libraries_are_set_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    require_hub()
    assert time.monotonic() - began < 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True
