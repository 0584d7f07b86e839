"""From text to a judged chat model by the commands of docs/evaluation.md, on slices of real data."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from steplm.config import RunConfig, dump_config

for library in ("lm_eval", "trl", "openai"):
    pytest.importorskip(library)

TASKS = ("lambada_openai", "piqa", "arc_easy", "hellaswag", "winogrande")


@pytest.fixture
def trained(tiny_run: Callable[..., RunConfig], steplm: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Export folders of a run in stages and of an ordinary one."""
    for name, num_stages in (("step", 2), ("vanilla", 1)):
        values = ("model.max_position_embeddings=768", f"plan.num_stages={num_stages}", f"name={name}")
        (tmp_path / f"{name}.yaml").write_text(dump_config(tiny_run(tmp_path / "runs" / name, *values)))
        result = steplm("train", f"{name}.yaml", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    return tmp_path / "runs/step/export", tmp_path / "runs/vanilla/export"


def test_train_export_tasks_tuning_chat_and_judge(
    trained: tuple[Path, Path],
    steplm: Callable[..., Any],
    stub_judge: Callable[..., Any],
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, vanilla = trained
    run = step.parent

    sets = ("--tasks-data", shared_data / "zero_shot", "--limit", 4)
    shown = steplm("eval", step, vanilla, "-t", ",".join(TASKS), *sets, "-o", run / "evaluation", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert all(task in shown.stdout for task in TASKS)

    with gzip.open(shared_data / "alpaca/alpaca_18k.json.gz", "rt", encoding="utf-8") as stream:
        (tmp_path / "alpaca.json").write_text(json.dumps(json.load(stream)[:40]))
    for model in (step, vanilla):
        tuned = model.parent / "sft"
        keys = ("max_steps=2", "per_device_train_batch_size=2", "sequence_length=256", "device=cpu", "precision=fp32")
        shown = steplm("sft", model, "--data", "alpaca.json", "-o", tuned, *keys, cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
    tuned = step.parent / "sft/export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tuned), AutoTokenizer.from_pretrained(tuned)
    assert model.config.num_hidden_layers == 4
    assert tokenizer.chat_template

    monkeypatch.setattr("sys.stdin", io.StringIO("Name a color.\nAnd another?\n"))
    shown = steplm("chat", tuned, "--max-new-tokens", 8, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip()

    judge = stub_judge()
    shown = steplm(
        "mtbench", tuned, vanilla.parent / "sft/export", "--name", "step", "--name", "vanilla",
        "--data", shared_data / "mt_bench", "--judge-model", "stub", "--base-url", judge.url,
        "--mode", "both", "--categories", "writing,math", "--limit", 1, "--max-new-tokens", 8,
        "-o", run / "mt_bench", cwd=tmp_path,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    singles, pairs = 2 * 2 * 2, 2 * 2 * 2  # models x questions x turns; questions x turns x orders
    assert len(judge.requests) == singles + pairs

    shown = steplm("report", run, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    tables = (run / "report/tables.md").read_text()
    assert "## Zero-shot tasks" in tables
    assert "## MT-Bench" in tables
    assert "math" in tables
