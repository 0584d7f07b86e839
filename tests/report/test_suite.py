"""What ``suite.json`` holds, and the numbers that are made of its runs."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from steplm.cli.report import show_report
from steplm.config import dump_config, load_config
from steplm.errors import SteplmError
from steplm.report.suite import EntryRecord, Question, RunEntry, SuiteRecord, load_suite, save_suite
from steplm.report.summary import Estimate, Suite, difference, estimate, read_suite
from steplm.report.tables import details_table, question_table, stages_table, tuning_table, write_tables

MakeSuite = Callable[..., Path]

RECORD = SuiteRecord(
    name="cpu",
    match="tokens",
    seeds=(0, 1),
    entries=(
        EntryRecord("vanilla", "Vanilla", "vanilla", settings={"plan.num_stages": 1}, learning_rate=0.002),
        EntryRecord("step", "STEP", "step", like="vanilla", tuned=True),
    ),
    runs=(RunEntry("vanilla", 0, 0.002, "runs/vanilla/lr0.002-seed0", "diverged", "loss nan"),),
    questions=(Question("Which?", ("vanilla", "step"), "vanilla"),),
    grid=(0.002, 0.004),
    baseline="vanilla",
)


# --- suite.json -------------------------------------------------------------------------------------------


def test_a_suite_reads_back_as_it_was_written(tmp_path: Path) -> None:
    save_suite(RECORD, tmp_path)
    assert load_suite(tmp_path) == RECORD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"entries": []}, "does not have: step, vanilla"),
        ({"runs": [{"entry": "vanilla"}]}, "cannot be read"),
        ({"name": "\ud800"}, "cannot be read: .*surrogates not allowed"),
    ],
)
def test_what_cannot_be_a_suite_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = save_suite(RECORD, tmp_path)
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), **changes}))
    with pytest.raises(SteplmError, match=message):
        load_suite(tmp_path)
    path.write_text(whole[:100])
    with pytest.raises(SteplmError, match="cannot be read"):
        load_suite(tmp_path)


def test_a_folder_without_suite_or_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SteplmError, match=r"neither a suite \(suite\.json\) nor a run"):
        read_suite(tmp_path)


# --- statistics -------------------------------------------------------------------------------------------


def test_the_interval_is_scipys_t_interval() -> None:
    values = [3.1, 3.4, 3.2, 3.35]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    result = estimate(values)
    assert (result.low, result.high) == pytest.approx((low, high))
    assert result.n == 4


def test_two_seeds_have_the_interval_of_the_tables() -> None:
    result = estimate([1.0, 2.0])
    assert result.half_width == pytest.approx(12.706 * 0.5, rel=1e-4)  # t(0.975, 1) s / √2 = t / 2


def test_one_seed_has_no_interval_and_none_has_no_mean() -> None:
    assert estimate([3.0]) == Estimate(3.0, None, None, 1)
    assert estimate([]) is None


def test_perplexity_is_the_exponential_of_the_mean_loss_and_of_its_ends() -> None:
    assert Estimate(1.0, 0.5, 1.5, 3).exp() == Estimate(math.e, math.exp(0.5), math.exp(1.5), 3)


def _with_losses(suite: Suite, losses: dict[str, list[float]]) -> Suite:
    """The suite with these validation losses, by seed, at the chosen rate."""
    runs = []
    for run in suite.runs:
        if run.counts and run.record is not None and run.record.summary is not None:
            summary = {**run.record.summary, "validation_loss": losses[run.entry.entry][run.entry.seed]}
            run = replace(run, record=replace(run.record, summary=summary))
        runs.append(run)
    return replace(suite, runs=tuple(runs))


@pytest.fixture(scope="module")
def suite_dir(make_suite: MakeSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_suite(tmp_path_factory.mktemp("suites") / "suite")


@pytest.fixture
def suite(suite_dir: Path) -> Suite:
    return read_suite(suite_dir)


@pytest.mark.parametrize(
    ("step", "verdict"),
    [
        ([3.1, 4.1, 5.1], "worse"),  # paired: the seeds differ far more than the methods
        ([2.9, 3.9, 4.9], "better"),
        ([3.1, 3.9, 5.0], "no difference seen"),
        ([3.0, 4.0, 5.0], "no difference seen"),
    ],
)
def test_the_verdict_is_paired_by_seed(suite: Suite, step: list[float], verdict: str) -> None:
    changed = _with_losses(suite, {"vanilla": [3.0, 4.0, 5.0], "step_2": step})
    result = difference(changed.entries["step_2"], changed.entries["vanilla"])
    assert result.verdict == verdict
    gaps = [a - b for a, b in zip(step, [3.0, 4.0, 5.0], strict=True)]
    assert result.estimate.mean == pytest.approx(sum(gaps) / 3)


def test_seeds_without_a_partner_are_left_out_of_the_difference(make_suite: MakeSuite, tmp_path: Path) -> None:
    unfinished = {("vanilla", 1): "running", ("step_2", 2): "diverged"}
    suite = read_suite(make_suite(tmp_path / "suite", unfinished=unfinished))
    result = difference(suite.entries["step_2"], suite.entries["vanilla"])
    assert (result.estimate.n, result.verdict) == (1, "1 of 3 diverged")


# --- what counts, and what is shown ---------------------------------------------------------------------------


def test_only_runs_at_the_chosen_rate_count(suite: Suite) -> None:
    assert len(suite.runs) == 10  # each entry: three rates with seed 0, then two seeds
    for entry in suite.entries.values():
        assert [(run.entry.seed, run.entry.learning_rate) for run in entry.runs] == [(0, 0.002), (1, 0.002), (2, 0.002)]


def test_numbers_are_those_of_the_run_directories(suite: Suite, suite_dir: Path) -> None:
    losses = [
        json.loads((suite_dir / f"runs/step_2/lr0.002-seed{seed}/summary.json").read_text())["validation_loss"]
        for seed in range(3)
    ]
    row = suite.entries["step_2"].row
    assert row["validation_loss_nats_per_token_mean"] == pytest.approx(sum(losses) / 3)
    assert row["validation_perplexity_mean"] == pytest.approx(math.exp(sum(losses) / 3))
    assert row["wikitext2_loss_nats_per_token_mean"] == pytest.approx(sum(losses) / 3 + 0.4)
    plan = suite.entries["step_2"].plan
    assert (
        row["planned_peak_model_state_bytes"] == row["measured_peak_model_state_bytes"] == plan.peak_model_state_bytes
    )
    assert row["tokens"] == plan.total_tokens
    assert row["training_flops"] == plan.training_flops


def test_a_run_without_an_evaluation_yet_is_left_out_of_the_curves(make_suite: MakeSuite, tmp_path: Path) -> None:
    suite_dir = make_suite(tmp_path / "suite", seeds=(0,), unfinished={("step_2", 0): "running"})
    log = suite_dir / "runs/step_2/lr0.002-seed0/metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"eval"' not in line))
    show_report(suite_dir, tmp_path / "report")
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.parametrize("status", ["running", "diverged", "failed", "waiting"])
def test_a_run_without_a_result_is_named_and_has_no_numbers(make_suite: MakeSuite, tmp_path: Path, status: str) -> None:
    names, seeds = ("vanilla", "step_2"), (0, 1)
    suite = read_suite(make_suite(tmp_path / "suite", names, seeds, {("step_2", 1): status}))
    (run,) = [run for run in suite.entries["step_2"].runs if run.entry.seed == 1]
    results = ("loss", "perplexity", "measured", "tokens", "flops", "elapsed", "dry_run")
    assert [value for name, value in run.row.items() if any(word in name for word in results) and value] == []
    assert suite.entries["step_2"].state == f"1 of 2: seed 1 {status}"
    output = tmp_path / "report"
    output.mkdir()
    write_tables(suite, output)
    assert f"STEP, 2 stages, seed 1, learning rate 0.002: {status}" in (output / "tables.md").read_text()
    (line,) = [
        row
        for row in csv.DictReader((output / "runs.csv").open())
        if (row["entry"], row["seed"], row["learning_rate"]) == ("step_2", "1", "0.002")
    ]
    assert (line["status"], line["validation_loss_nats_per_token"]) == (status, "")


def test_a_diverged_seed_is_the_verdict(make_suite: MakeSuite, tmp_path: Path) -> None:
    suite = read_suite(make_suite(tmp_path / "suite", unfinished={("step_2", 2): "diverged"}))
    table = question_table(suite, suite.record.questions[0])
    verdicts = [row[table.columns.index("verdict")].text for row in table.rows]
    assert verdicts == ["–", "1 of 3 diverged"]


def test_the_table_begins_with_the_baseline_and_tells_the_saving(suite: Suite) -> None:
    question = replace(suite.record.questions[0], entries=("step_2", "vanilla"))
    table = question_table(suite, question)
    assert [row[0].text for row in table.rows] == ["Vanilla (baseline)", "STEP, 2 stages"]
    plans = [suite.entries[name].plan for name in ("step_2", "vanilla")]
    share = plans[0].peak_model_state_bytes / plans[1].peak_model_state_bytes - 1
    saved = table.rows[1][table.columns.index("against Vanilla")]
    assert saved.value == pytest.approx(share)
    assert saved.text.startswith("−")
    assert "One seed" not in table.caption


def test_one_seed_is_said_to_be_one(make_suite: MakeSuite, tmp_path: Path) -> None:
    suite = read_suite(make_suite(tmp_path / "suite", seeds=(0,)))
    table = question_table(suite, suite.record.questions[0])
    assert "One seed: no interval can be given." in table.caption
    assert table.rows[1][table.columns.index("verdict")].text == "one seed: no verdict"
    assert "±" not in "".join(cell.text for row in table.rows for cell in row)


def test_entries_that_are_not_matched_are_named(suite: Suite) -> None:
    runs = []
    for run in suite.runs:
        if run.entry.entry == "step_2" and run.record is not None:
            run = replace(run, record=replace(run.record, events=run.record.events[: len(run.record.events) // 2]))
        runs.append(run)
    caption = question_table(replace(suite, runs=tuple(runs)), suite.record.questions[0]).caption
    assert "Not equal in tokens: STEP, 2 stages" in caption
    assert "Not equal" not in question_table(suite, suite.record.questions[0]).caption


def test_the_tuning_table_marks_choice_edge_and_divergence(suite: Suite) -> None:
    entries = tuple(replace(e, learning_rate=0.004, at_edge=True) for e in suite.record.entries)
    runs = tuple(
        replace(run, entry=replace(run.entry, status="diverged"))
        if (run.entry.entry, run.entry.learning_rate) == ("step_2", 0.001)
        else run
        for run in suite.runs
    )
    table = tuning_table(replace(suite, record=replace(suite.record, entries=entries), runs=runs))
    assert table.columns == ("method", "0.001", "0.002", "0.004")
    assert table.rows[1][1].text == "diverged"
    assert table.rows[1][1].value is None
    for row in table.rows:
        assert [cell.strong for cell in row] == [False, False, False, True]
        assert row[3].text.endswith("(edge)")
    assert "Edge:" in table.caption
    assert "| diverged |" in table.markdown()


def test_a_column_in_which_nothing_stands_is_left_out(suite: Suite) -> None:
    columns = details_table(suite, suite.record.questions[0]).columns
    assert "measured dry run" in columns
    assert "measured peak" not in columns  # of accelerators alone


def test_markdown_escapes_what_would_end_a_cell(suite: Suite) -> None:
    entries = tuple(replace(e, label="a|b") for e in suite.record.entries)
    text = question_table(replace(suite, record=replace(suite.record, entries=entries)), suite.record.questions[0])
    header, rule, *rows = [line for line in text.markdown().splitlines() if line.startswith("|")]
    assert all(row.replace("\\|", "").count("|") == rule.count("|") for row in (header, *rows))
    assert "a\\|b" in rows[1]


# --- runs without a suite -------------------------------------------------------------------------------------


def test_a_run_directory_is_an_entry_of_its_own(suite_dir: Path) -> None:
    suite = read_suite(suite_dir / "runs/step_2/lr0.002-seed1")
    (entry,) = suite.entries.values()
    assert (entry.label, entry.state) == ("step_2", "1")
    assert entry.record.label == "step_2", "what a figure calls it"
    table = stages_table(entry)
    assert [row[1].text for row in table.rows] == ["finished", "finished"]


def test_of_a_learning_rate_for_each_stage_the_first_is_listed(suite_dir: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(suite_dir / "runs/step_2/lr0.002-seed1", tmp_path / "run")
    config = load_config(run_dir / "config.yaml", ["optim.learning_rate=[0.003, 0.001]"])
    (run_dir / "config.yaml").write_text(dump_config(config))
    (entry,) = read_suite(run_dir).entries.values()
    assert entry.entry.learning_rate == 0.003


def test_a_folder_of_runs_sets_them_side_by_side(suite_dir: Path) -> None:
    run_dir = suite_dir / "runs/step_2/lr0.001-seed0"
    (run_dir / "export").mkdir()
    (run_dir / "export/plan.json").write_text((run_dir / "plan.json").read_text())  # as every finished run has it
    suite = read_suite(suite_dir / "runs/step_2")
    assert list(suite.entries) == [f"lr{tail}" for tail in ("0.001-seed0", "0.002-seed0", "0.002-seed1",
                                                            "0.002-seed2", "0.004-seed0")]  # fmt: skip
    table = question_table(suite, suite.record.questions[0])
    assert "verdict" not in table.columns
    assert table.rows[0][table.columns.index("against vanilla")].text.startswith("−")


def test_the_report_of_a_suite_has_all_its_files(make_suite: MakeSuite, tmp_path: Path) -> None:
    suite_dir = make_suite(tmp_path / "suite", seeds=(0, 1), unfinished={("step_2", 1): "running"})
    show_report(suite_dir, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    figures = ("loss_tokens", "loss_flops", "loss_seconds", "perplexity_memory", "growth", "memory")
    assert found == {
        "index.html", "tables.md", "runs.csv", "summary.csv", "summary.json", "figures/learning_rate.png",
        *(f"figures/q1_{name}.png" for name in figures),
    }  # fmt: skip
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    (question,) = document["questions"]
    assert question["differences"]["step_2"]["pairs"] == 1
    assert [entry["entry"] for entry in document["entries"]] == ["vanilla", "step_2"]


def test_a_suite_of_which_nothing_has_begun_has_a_report(tmp_path: Path) -> None:
    runs = (RunEntry("vanilla", 0, 0.002, "runs/vanilla/lr0.002-seed0"),)
    save_suite(replace(RECORD, runs=runs), tmp_path)
    show_report(tmp_path, None)
    text = (tmp_path / "report" / "tables.md").read_text()
    assert "0 of 1: seed 0 waiting" in text
    assert "no learning rate" in text
