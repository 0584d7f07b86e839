"""The shipped suites can be run as they are: every run has a plan, and all are matched."""

from __future__ import annotations

import pytest

from steplm.compare.check import check_plans
from steplm.compare.entries import Suite
from steplm.compare.suite import read_suite
from steplm.config import recipes_dir

SUITES = sorted(path.stem for path in (recipes_dir() / "suites").glob("*.yaml"))


def test_there_are_suites() -> None:
    assert {"cpu", "gpu"} <= set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_every_run_of_a_shipped_suite_is_planned_and_matched(name: str) -> None:
    suite = Suite(read_suite(name))
    assert check_plans(suite)
    assert all(question.entries for question in suite.questions)


def test_the_positions_that_are_compared_are_different_places() -> None:
    for name in SUITES:
        suite = Suite(read_suite(name))
        entries = [entry for entry in suite.entries.values() if entry.name.startswith("position=")]
        entries = [entry for entry in entries if entry.name != "position=random"]  # it may draw one of the others
        runs = [next(iter(suite.possible_runs(entry, {}))) for entry in entries]
        maps = [suite.plan(run).stages[-1].layer_map for run in runs]
        assert len(set(maps)) == len(maps)
