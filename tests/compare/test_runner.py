"""Whole suites of tiny runs, in real processes: shared, killed, failed, diverged, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from steplm.compare import runner as runner_module
from steplm.compare.check import check_folders, check_plans, prepare_data
from steplm.compare.display import SuiteDisplay
from steplm.compare.entries import RunKey, Suite
from steplm.compare.lock import exclusive
from steplm.compare.runner import Runner, problems_of
from steplm.compare.sharing import Start
from steplm.compare.suite import read_suite
from steplm.errors import CheckpointMismatch, SteplmError
from steplm.models.folder import load_state
from steplm.report.suite import SuiteRecord, load_suite
from steplm.report.summary import read_suite as read_results
from steplm.training.metrics import read_metrics

Values = Callable[..., dict[str, Any]]

KEYS = ("event", "stage", "step", "tokens_seen", "loss", "grad_norm", "learning_rate", "loss_before", "loss_after")
SHARING = [
    {"name": "vanilla", "method": "vanilla"},
    {"name": "position", "method": "step", "vary": {"growth.position": ["upper", "lower"]}},
]


def run(values: dict[str, Any], jobs: int = 1) -> SuiteRecord:
    suite = Suite(read_suite(values))
    configs = prepare_data(suite, check_plans(suite))
    check_folders(suite, configs)
    return Runner(suite, configs, SuiteDisplay(Console(quiet=True)), jobs=jobs).run()


def history(run_dir: Path) -> list[tuple[Any, ...]]:
    """All of a log that does not depend on the clock."""
    return [tuple(event.get(key) for key in KEYS) for event in read_metrics(run_dir / "metrics.jsonl")]


def assert_equal_suites(one: Path, other: Path) -> None:
    runs = load_suite(one).runs
    assert [entry.dir for entry in runs] == [entry.dir for entry in load_suite(other).runs]
    for entry in runs:
        assert history(one / entry.dir) == history(other / entry.dir)
        ours, theirs = load_state(one / entry.dir / "export"), load_state(other / entry.dir / "export")
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.fixture(scope="module")
def alone(suite_values: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite of ``SHARING``, one run after the other, nothing shared."""
    directory = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "stage_keys", lambda config, plan: ())
        record = run(suite_values(directory, entries=SHARING))
    assert [entry.shared_from for entry in record.runs] == [None, None, None]
    return directory


def test_side_by_side_with_shared_stages_equals_one_after_another_alone(
    suite_values: Values, alone: Path, tmp_path: Path
) -> None:
    record = run(suite_values(tmp_path, entries=SHARING), jobs=2)
    assert {entry.status for entry in record.runs} == {"finished"}
    sources = {entry.entry: entry.shared_from for entry in record.runs}
    upper = next(entry.dir for entry in record.runs if entry.entry == "position=upper")
    assert sources == {"vanilla": None, "position=upper": None, "position=lower": upper}
    assert_equal_suites(tmp_path, alone)
    assert not list(tmp_path.rglob("checkpoints")), "no further run needs them"
    assert load_suite(tmp_path) == record


def test_losses_on_other_validation_tokens_or_of_other_data_do_not_mix(suite_values: Values, tmp_path: Path) -> None:
    values = suite_values(tmp_path, entries=[{"name": "vanilla", "method": "vanilla"}])
    assert {entry.status for entry in run(values).runs} == {"finished"}
    other = {**values, "run": {**values["run"], "eval": {**values["run"].get("eval", {}), "max_tokens": 50}}}
    with pytest.raises(CheckpointMismatch, match=r"eval\.max_tokens: .* -> 50"):
        run(other)
    summary = next(tmp_path.glob("runs/vanilla/*/summary.json"))
    summary.write_text(summary.read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0'))
    with pytest.raises(CheckpointMismatch, match="the prepared data: 0"):
        run(values)


def test_the_rate_with_the_lowest_loss_is_chosen_and_taken_over_and_divergence_is_a_result(
    suite_values: Values, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("the model grows new layers " * 20)
    entries = [
        {"name": "vanilla", "method": "vanilla"},
        {"name": "alike", "like": "vanilla", "set": {"optim.weight_decay": 0.5}},
        {"name": "hopeless", "method": "vanilla", "learning_rates": [1e30]},
    ]
    values = suite_values(
        tmp_path,
        entries=entries,
        tune={"learning_rates": [1e-3, 1e-2, 1e30]},
        seeds=[1],
        evaluate={"words": {"data": str(tmp_path / "text.txt")}},
    )
    record = run(values)
    status = {(entry.entry, entry.seed, entry.learning_rate): entry.status for entry in record.runs}
    assert status == {
        ("vanilla", 0, 1e-3): "finished",
        ("vanilla", 0, 1e-2): "finished",
        ("vanilla", 0, 1e30): "diverged",
        ("vanilla", 1, 1e-2): "finished",
        ("alike", 1, 1e-2): "finished",
        ("hopeless", 0, 1e30): "diverged",
    }
    rates = {entry.name: (entry.learning_rate, entry.at_edge) for entry in record.entries}
    assert rates == {"vanilla": (1e-2, False), "alike": (1e-2, False), "hopeless": (None, False)}
    assert len(problems_of(record)) == 1
    assert "'hopeless' has no learning rate" in problems_of(record)[0]
    scores = json.loads((tmp_path / record.runs_of("alike")[0].dir / "evaluations.json").read_text())
    assert scores["words"]["num_tokens"] > 100
    assert scores["words"]["perplexity"] > 1
    assert run(values) == record, "what has diverged is not tried again"


def test_a_diverged_run_of_another_configuration_is_tried_again(suite_values: Values, tmp_path: Path) -> None:
    entries = [{"name": "vanilla", "method": "vanilla", "set": {"optim.learning_rate": 1e30}}]
    values = suite_values(tmp_path, entries=entries)
    record = run(values)
    assert [entry.status for entry in record.runs] == ["diverged"]
    assert problems_of(record) == ["entry 'vanilla' has no result: every run of it diverged"]
    log = tmp_path / record.runs[0].dir / "metrics.jsonl"
    before = log.stat().st_mtime_ns
    assert run(values) == record
    assert log.stat().st_mtime_ns == before, "the same configuration is not tried again"
    for change in ({"optim.weight_decay": 0.0}, {"train.per_device_train_batch_size": 1}):
        entries[0]["set"] |= change
        before = log.stat().st_mtime_ns
        run(values)
        assert log.stat().st_mtime_ns > before, change


def test_kept_results_are_gone_on_with_though_their_models_are_gone(
    suite_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``benchmarks/keep_results.py`` keeps them: no weights, and a variable in place of the folder of the data."""
    (tmp_path / "text.txt").write_text("the model grows new layers " * 20)
    monkeypatch.setenv("FOLDER", str(tmp_path))
    keys = {
        "entries": [{"name": "vanilla", "method": "vanilla"}],
        "evaluate": {"words": {"data": str(tmp_path / "text.txt")}},
    }
    first = run(suite_values(tmp_path / "suite", **keys))
    run_dir = tmp_path / "suite" / first.runs[0].dir
    shutil.rmtree(run_dir / "export")
    scores = run_dir / "evaluations.json"
    scores.write_text(scores.read_text().replace(str(tmp_path), "${FOLDER:-data}"))
    kept = scores.read_text()
    more = run(suite_values(tmp_path / "suite", **keys, seeds=[0, 1]))
    assert [(entry.seed, entry.status) for entry in more.runs] == [(0, "finished"), (1, "finished")]
    assert scores.read_text() == kept
    # A text that is another now is scored again, where there is a model.
    (tmp_path / "text.txt").write_text("another text " * 30)
    run(suite_values(tmp_path / "suite", **keys, seeds=[0, 1]))
    rescored = json.loads((tmp_path / "suite" / more.runs[1].dir / "evaluations.json").read_text())
    assert rescored["words"]["num_tokens"] != json.loads(kept)["words"]["num_tokens"]
    assert scores.read_text() == kept


def test_the_seed_of_the_tuning_counts_only_where_it_is_one_of_the_seeds(suite_values: Values, tmp_path: Path) -> None:
    entries = [{"name": "vanilla", "method": "vanilla"}]
    record = run(suite_values(tmp_path, entries=entries, tune={"learning_rates": [1e-3], "seed": 7}, seeds=[1, 2]))
    assert [entry.seed for entry in record.runs] == [7, 1, 2]
    assert [entry.seed for entry in record.runs_of("vanilla")] == [1, 2]
    assert len(read_results(tmp_path).entries["vanilla"].finished) == 2


def test_a_damaged_stage_of_another_run_is_trained_again(
    suite_values: Values, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = suite_values(tmp_path, entries=SHARING, keep_checkpoints=True)
    upper = {**SHARING[1], "vary": {"growth.position": ["upper"]}}
    run({**values, "entries": [SHARING[0], upper]})
    for end in tmp_path.glob("runs/position=upper/*/checkpoints/stage1-end"):
        (end / "state.json").write_text("damaged")
    record = run(values)
    assert {entry.status for entry in record.runs} == {"finished"}
    assert [entry.shared_from for entry in record.runs] == [None, None, None]
    assert_equal_suites(tmp_path, alone)


def test_the_grid_grows_beyond_an_edge_and_around_the_best(suite_values: Values, tmp_path: Path) -> None:
    entries = [{"name": "vanilla", "method": "vanilla"}]
    tune = {"learning_rates": [1e-5, 1e-4], "extend": 2, "refine": 1}
    record = run(suite_values(tmp_path, entries=entries, tune=tune, seeds=[0, 1]))
    assert [(entry.seed, entry.learning_rate) for entry in record.runs] == [
        (0, 1e-5), (0, 1e-4), (0, 1e-3), (0, 1e-2), (0, 3.16e-3), (1, 1e-2),
    ]  # fmt: skip
    assert record.grid == (1e-5, 1e-4, 1e-3, 3.16e-3, 1e-2)
    assert record.entry("vanilla").learning_rate == 1e-2
    assert record.entry("vanilla").at_edge


def test_of_the_finalists_the_rate_with_the_best_mean_over_all_seeds_is_chosen(
    suite_values: Values, tmp_path: Path
) -> None:
    entries = [{"name": "vanilla", "method": "vanilla"}, {"name": "alike", "like": "vanilla"}]
    tune = {"learning_rates": [1e-5, 3e-3, 1e-2, 1e30], "finalists": 2}
    record = run(suite_values(tmp_path, entries=entries, tune=tune, seeds=[0, 1]))
    tried = [(entry.seed, entry.learning_rate) for entry in record.runs_of("vanilla", chosen=False)]
    assert sorted(tried) == [(0, 1e-5), (0, 3e-3), (0, 1e-2), (0, 1e30), (1, 3e-3), (1, 1e-2)]
    losses: dict[float, list[float]] = {3e-3: [], 1e-2: []}
    for entry in record.runs_of("vanilla", chosen=False):
        if entry.learning_rate in losses:
            summary = json.loads((tmp_path / entry.dir / "summary.json").read_text())
            losses[entry.learning_rate].append(summary["validation_loss"])
    assert all(len(of_seeds) == 2 for of_seeds in losses.values())
    chosen = min(losses, key=lambda rate: sum(losses[rate]))
    assert record.entry("vanilla").learning_rate == record.entry("alike").learning_rate == chosen
    assert record.finalists == 2


def test_a_failed_run_is_named_the_others_are_done_and_it_is_tried_again(suite_values: Values, tmp_path: Path) -> None:
    values = suite_values(tmp_path)
    log = tmp_path / RunKey("vanilla", 0, 1e-2).dir / "metrics.jsonl"
    log.mkdir(parents=True)  # where a file should be
    record = run(values)
    failed, done = record.runs
    assert (failed.entry, failed.status, done.status) == ("vanilla", "failed", "finished")
    assert "IsADirectoryError" in str(failed.error)
    assert problems_of(record) == [f"{failed.dir}: {failed.error}"]
    assert "Traceback" in (tmp_path / failed.dir / "log.txt").read_text()
    log.rmdir()
    written_at = (tmp_path / done.dir / "summary.json").stat().st_mtime_ns
    assert [entry.status for entry in run(values).runs] == ["finished", "finished"]
    assert (tmp_path / done.dir / "summary.json").stat().st_mtime_ns == written_at


def test_a_killed_process_fails_its_run_alone(
    suite_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Runner._start

    def start_and_kill_the_first(self: Runner, start: Start[RunKey]) -> None:
        original(self, start)
        if start.run.entry == "vanilla":
            self.jobs[start.run].process.kill()

    monkeypatch.setattr(Runner, "_start", start_and_kill_the_first)
    killed, done = run(suite_values(tmp_path)).runs
    assert (killed.status, done.status) == ("failed", "finished")
    assert killed.error == "its process was killed by SIGKILL, perhaps for lack of memory"


def _started(values: dict[str, Any], tmp_path: Path, num_events: int) -> subprocess.Popen[bytes]:
    """``steplm compare`` in a process, when some run has logged so many events."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "steplm", "compare", "tiny.yaml", "--no-report", "log.progress=lines"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "stdout").open("wb") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
    directory = Path(values["output_dir"])
    deadline = time.monotonic() + 120
    while not any(len(read_metrics(log)) >= num_events for log in directory.glob("runs/*/*/metrics.jsonl")):
        assert process.poll() is None, (tmp_path / "stdout").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_suite_that_is_stopped_at_any_time_ends_as_if_it_were_not(
    suite_values: Values, alone: Path, tmp_path: Path, signum: int
) -> None:
    values = suite_values(tmp_path / "suite", entries=SHARING)
    process = _started(values, tmp_path, num_events=4)
    process.send_signal(signum)
    code = process.wait(timeout=60)
    assert code == (-signal.SIGKILL if signum == signal.SIGKILL else 130)
    if signum == signal.SIGINT:
        assert "run the same command again to resume" in (tmp_path / "stdout").read_text()
        assert {entry.status for entry in load_suite(tmp_path / "suite").runs} <= {"waiting", "finished"}
    record = run(values)
    assert {entry.status for entry in record.runs} == {"finished"}
    assert_equal_suites(tmp_path / "suite", alone)


def test_one_directory_takes_one_suite_at_a_time(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path, lambda: None),
        pytest.raises(SteplmError, match="another process runs the suite"),
        exclusive(tmp_path, lambda: None),
    ):
        pass


def test_a_folder_of_another_run_is_refused_with_the_keys_named(
    suite_values: Values, alone: Path, tmp_path: Path
) -> None:
    values = suite_values(alone, entries=SHARING)
    for key, value in {"optim.weight_decay": 0.2, "pet.rank": 2}.items():
        section, name = key.split(".")
        changed = {**values, "run": {**values["run"], section: {**values["run"][section], name: value}}}
        with pytest.raises(CheckpointMismatch, match=key):
            run(changed)
    entries = [entry for entry in SHARING if entry["name"] == "vanilla"]
    assert [entry.entry for entry in run({**values, "entries": entries}).runs] == ["vanilla"]
    run(values)  # the runs that were left out are still there, and counted again
    assert [entry.status for entry in load_suite(alone).runs] == ["finished"] * 3
