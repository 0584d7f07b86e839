"""The shipped suites can be run as they are: every run has a plan, and all are matched."""

from __future__ import annotations

import pytest

from steplm.cli.compare import run_compare
from steplm.compare.check import check_plans
from steplm.compare.entries import Suite
from steplm.compare.suite import read_suite
from steplm.config import recipes_dir

SUITES = sorted(path.stem for path in (recipes_dir() / "suites").glob("*.yaml"))


def test_a_dry_run_shows_every_rate_and_seed_whole_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_compare("cpu_muon", [], dry_run=True) == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {"0.004", "0.008", "step_3_muon_8bit", "10.05"} <= set(words)
    assert not [word for word in words if word.endswith("…") and word != "…"], "something is cut"


def test_there_are_suites() -> None:
    assert {"cpu", "gpu"} <= set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_every_run_of_a_shipped_suite_is_planned_and_matched(name: str) -> None:
    suite = Suite(read_suite(name))
    assert check_plans(suite)
    assert all(question.entries for question in suite.questions)
    positions = [entry for entry in suite.entries.values() if entry.name.startswith("position=")]
    runs = [next(iter(suite.possible_runs(entry, {}))) for entry in positions]
    maps = [suite.plan(run).schedule.phases[-1].entry.layer_map for run in runs if run.entry != "position=random"]
    assert len(set(maps)) == len(maps), "positions that put layers at the same place are no comparison"
