"""``steplm quickstart`` on a tiny corpus: three runs, one table, a figure and a sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from steplm.cli.quickstart import WAYS, run_quickstart
from steplm.planner.auto import load_config


def test_three_ways_are_trained_and_compared(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quickstart"
    tiny = (
        f"data.train={tiny_corpus}", f"data.prepared_dir={tmp_path / 'prepared'}", "model.hidden_size=32",
        "model.intermediate_size=48", "model.num_hidden_layers=2", "model.vocab_size=300", "pet.rank=4",
        "train.sequence_length=16", "plan.total_tokens=1024", "eval.max_tokens=256", "log.progress=none",
    )  # fmt: skip
    assert run_quickstart(output, list(tiny)) == 0
    told = capsys.readouterr().out
    table = told[told.index("result") :]
    for label in WAYS:
        assert f"\n{label} " in table
        assert (output / label.lower() / "export" / "config.json").exists()
    assert "which has the lowest perplexity" in table
    assert (output / "loss_and_memory.png").stat().st_size > 10_000


def test_the_ways_differ_in_what_they_are_named_for() -> None:
    auto, step, vanilla = (load_config("quickstart", settings) for _, settings in WAYS.values())
    assert (auto.optim.name, auto.memory.optimizer_states, auto.plan.num_stages) == ("muon", "8bit", 1)
    assert (step.method, step.plan.num_stages, step.optim.name) == ("step", 2, "adamw")
    assert (vanilla.method, vanilla.plan.num_stages, vanilla.memory.optimizer_states) == ("vanilla", 1, "fp32")
