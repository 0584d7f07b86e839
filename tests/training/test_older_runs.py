"""Run directories of version 0.1, whose plans had stages in place of a schedule: read where finished, else refused.

``tests/golden/runs_of_0_1`` holds what that version wrote, without weights: ``unfinished`` was stopped by SIGTERM in
its second stage, ``restarts`` is STEP with ``pet.restarts=1``, ``thawed`` had the old keys of ``method=thawed``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.config import RunConfig, load_config, load_written_config
from steplm.errors import CheckpointError, ConfigError
from steplm.planner.plan import SCHEMA_VERSION, Plan, plan
from steplm.training.metrics import read_metrics
from steplm.training.run import train

GOLDEN = Path(__file__).parents[1] / "golden" / "runs_of_0_1"
FINISHED = ("restarts", "thawed")


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``old_run(name)``: a copy of that run directory, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def copy(name: str) -> Path:
        run_dir = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        (run_dir / ".lock").touch()  # as every run leaves it
        return run_dir

    return copy


def _config(run_dir: Path) -> RunConfig:
    """As it was begun, in the spelling of today."""
    return load_written_config(run_dir / "config.yaml").model_copy(update={"output_dir": str(run_dir)})


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _old_plan(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "plan.json").read_text())


def _bytes(terms: list[dict[str, Any]]) -> int:
    return sum(term["num_bytes"] for term in terms if term["kind"] != "host")


def test_an_unfinished_one_is_refused_with_both_versions_and_left_as_it_is(old_run: Callable[[str], Path]) -> None:
    run_dir = old_run("unfinished")
    config, before = _config(run_dir), _files(run_dir.parent)
    version = _old_plan(run_dir)["schema_version"]
    assert version < SCHEMA_VERSION
    for asked in (config, config.model_copy(update={"seed": 7})):  # before anything else is said of it
        with pytest.raises(CheckpointError, match=rf"plan schema {version}; this version has {SCHEMA_VERSION}") as told:
            train(asked)
    assert "output_dir" in str(told.value), "a way out is named"
    assert _files(run_dir.parent) == before, "and no data are prepared"


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_one_gives_its_result_at_once(old_run: Callable[[str], Path], name: str) -> None:
    run_dir = old_run(name)
    before = _files(run_dir.parent)
    result = train(_config(run_dir))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert result.finished
    assert result.validation_loss == summary["validation_loss"]
    assert result.export_dir == run_dir / "export"
    assert _files(run_dir.parent) == before
    _check_plan(result.plan, _old_plan(run_dir))


def _check_plan(made: Plan, old: dict[str, Any]) -> None:
    """Made again from the configuration, it has the layers, tokens and bytes that were written."""
    growths = [stage for stage in old["stages"] if stage["num_new_layers"]]
    assert made.layers == tuple(stage["num_new_layers"] for stage in growths)
    assert [phase.tokens for phase in made.schedule.phases] == [stage["tokens"] for stage in old["stages"]]
    for phase, stage in zip(made.schedule.phases, old["stages"], strict=True):
        cost = made.cost(phase)
        assert cost.memory.total_bytes == _bytes(stage["memory"]["terms"])
        assert cost.flops_per_token == stage["flops_per_token"]
        assert (cost.peak is None) == (stage["peak"] is None)
        if cost.peak is not None:
            assert cost.peak.total_bytes == max(_bytes(one["memory"]["terms"]) for one in stage["peak"]["instants"])
    assert made.vanilla_model_state_bytes == old["vanilla_model_state_bytes"]
    assert made.vanilla_peak_bytes == old["vanilla_peak_bytes"]


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_one_is_reported(old_run: Callable[[str], Path], name: str, steplm: Callable[..., Any]) -> None:
    run_dir = old_run(name)
    before = _files(run_dir)
    result = steplm("report", run_dir, "--output", run_dir.parent / "report", cwd=run_dir.parent)
    assert result.returncode == 0, result.stderr
    text = "".join(table.read_text() for table in (run_dir.parent / "report").glob("*.md"))
    loss = json.loads((run_dir / "summary.json").read_text())["validation_loss"]
    assert name in text
    assert f"{loss:.3f}" in text
    assert (run_dir.parent / "report" / "index.html").stat().st_size > 1000
    assert _files(run_dir) == before


@pytest.mark.parametrize("name", FINISHED)
def test_the_log_of_a_finished_one_is_read_whole(old_run: Callable[[str], Path], name: str) -> None:
    events = read_metrics(old_run(name) / "metrics.jsonl")
    assert events[-1]["event"] == "run_end"


def test_its_old_keys_are_refused_where_a_person_writes_them(old_run: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"optim\.low_rank_layers=old is now method=thawed"):
        load_config(old_run("thawed") / "config.yaml")
    assert plan(_config(old_run("unfinished"))).layers == (1, 1)
