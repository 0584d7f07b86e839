"""What is read from a run directory, and what the table says of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from steplm.config import RunConfig, dump_config
from steplm.errors import SteplmError
from steplm.planner.plan import plan
from steplm.report.figure import measured_spans, run_figure
from steplm.report.page import write_page
from steplm.report.runs import COLUMNS, RunRecord, load_run, render_rich
from steplm.report.summary import read_suite
from steplm.report.tables import sources_table, stages_table
from steplm.training.run import train
from steplm.types import to_json
from steplm.units import format_bytes, format_count

MakeRecord = Callable[..., RunRecord]


def cells(record: RunRecord) -> list[str]:
    return [write(record) for write in COLUMNS.values()]


def write_run(record: RunRecord, run_dir: Path) -> Path:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(record.config))
    (run_dir / "plan.json").write_text(json.dumps(to_json(record.plan)))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in record.events))
    if record.summary is not None:
        (run_dir / "summary.json").write_text(json.dumps(record.summary))
    return run_dir


@pytest.mark.parametrize("until", [0.0, 0.5, 1.0])
def test_a_run_directory_reads_back_finished_or_not(make_record: MakeRecord, tmp_path: Path, until: float) -> None:
    record = make_record(until=until)
    assert load_run(write_run(record, tmp_path / "run"), label=record.label) == record


def test_a_run_is_called_by_its_configured_name(make_record: MakeRecord, tmp_path: Path) -> None:
    assert load_run(write_run(make_record(), tmp_path / "folder")).label == "run"


def test_a_run_that_has_a_plan_but_no_metrics_yet_has_no_numbers(make_record: MakeRecord, tmp_path: Path) -> None:
    run_dir = write_run(make_record(until=0.5), tmp_path / "run")
    (run_dir / "metrics.jsonl").unlink()
    assert cells(load_run(run_dir)) == ["run", "6+4", "2.10 GiB", "–", "−26.3%", "–", "0", "–", "–"]


def test_a_folder_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SteplmError, match=r"not a run directory: it has no plan\.json"):
        load_run(tmp_path)


def test_the_table_has_the_numbers_of_the_plan_and_of_the_events(make_record: MakeRecord) -> None:
    record = make_record()
    planned = format_bytes(max(stage.memory.total_bytes for stage in record.plan.stages))
    speeds = sorted(event["tokens_per_second"] for event in record.events_of("train"))
    # The perplexity is the export's, not that of the last evaluation.
    results = ["20.00", "100M", f"{sum(speeds[99:101]) / 2:,.0f}", "55h33m"]
    assert cells(record) == ["STEP", "6+4", planned, planned, "−26.3%", *results]


def test_a_run_in_progress_shows_its_latest_evaluation(make_record: MakeRecord) -> None:
    record = make_record(until=0.5)
    perplexity = record.events_of("eval")[-1]["perplexity"]
    last = record.events_of("train")[-1]
    assert cells(record)[5:7] == [f"{perplexity:.2f}", format_count(last["tokens_seen"])]
    assert record.elapsed_seconds == last["elapsed_seconds"]


def test_measured_bytes_are_the_largest_stage_not_the_last(make_record: MakeRecord) -> None:
    record = make_record()
    events = [{"event": "stage_start", "stage": i, "measured_bytes": {"total": n}} for i, n in ((1, 30), (2, 20))]
    assert replace(record, events=tuple(events)).measured_model_state_bytes == 30


def test_a_plan_of_another_version_is_an_error_that_names_the_file(make_record: MakeRecord, tmp_path: Path) -> None:
    run_dir = write_run(make_record(), tmp_path / "run")
    (run_dir / "plan.json").write_text('{"stages": []}')
    with pytest.raises(SteplmError, match=r"plan\.json cannot be read"):
        load_run(run_dir)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run of 2 + 1 layers as steplm 0.1 wrote it: one restart of the adapters, counted as a third stage."""
    values = {
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
        "plan": {"num_stages": 2, "layers": [2, 1], "total_tokens": 9 * 1024, "freeze_old_layers": True},
        "pet": {"rank": 4, "restarts": 1, "layers": "old"},
        "optim": {"name": "adamw", "low_rank_layers": "all"},
        "train": {"sequence_length": 128},
    }
    run_dir = tmp_path / "old"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    stages = [{"index": i, "num_new_layers": n} for i, n in ((1, 2), (2, 1), (3, 0))]
    (run_dir / "plan.json").write_text(json.dumps({"schema_version": 2, "shape": {}, "stages": stages}))
    kinds = {"weights": 2, "gradients": 2, "optimizer": 12, "adapters": 4, "total": 20}
    train = {"event": "train", "elapsed_seconds": 1.0, "tokens_per_second": 1000.0, "loss": 5.0}
    events = []
    for stage, seen in ((1, 6144), (2, 7168), (3, 9216)):
        if stage == 2:
            events.append({"event": "growth", "stage": 2, "tokens_seen": 6144})
        events.append({"event": "stage_start", "stage": stage, "measured_bytes": kinds})
        events.append(train | {"stage": stage, "tokens_seen": seen})
        events.append({"event": "eval", "stage": stage, "tokens_seen": seen, "loss": 5.0 - stage, "perplexity": 9.0})
        events.append({"event": "stage_end", "stage": stage, "tokens_seen": seen})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


def test_a_run_of_steplm_0_1_is_read_and_its_restarts_belong_to_the_stage_of_their_growth(old_run: Path) -> None:
    record = load_run(old_run)
    assert record.config.method == "step"
    assert record.plan == plan(record.config)
    assert record.plan.layers == (2, 1)
    assert [event["stage"] for event in record.events_of("stage_start")] == [1, 2, 2]
    assert [(span.start, span.end) for span in measured_spans(record)] == [(0, 6144), (6144, 7168), (7168, 9216)]
    (entry,) = read_suite(old_run).entries.values()
    table = stages_table(entry)
    assert [[cell.text for cell in row[:6]] for row in table.rows] == [
        ["1", "finished", "2", "2", format_count(record.plan.stages[0].tokens), "4.0000"],
        ["2", "finished", "3", "1", format_count(record.plan.stages[1].tokens), "2.0000"],
    ]


def test_the_report_of_a_run_has_the_last_loss_of_each_source_and_validation_set(old_run: Path) -> None:
    (entry,) = read_suite(old_run).entries.values()
    assert sources_table(entry) is None
    log = old_run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for number, event in enumerate(lines):
        if event["event"] == "train":
            event |= {"loss_web": 3.0 + number, "loss_code": 2.5}
        if event["event"] == "eval":
            event |= {"loss_web": 4.0, "loss_odd": "no number"}
    log.write_text("".join(json.dumps(event) + "\n" for event in lines))
    (entry,) = read_suite(old_run).entries.values()
    table = sources_table(entry)
    last = max(number for number, event in enumerate(lines) if event["event"] == "train")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["web", "training source", f"{3 + last:.4f}"],
        ["code", "training source", "2.5000"],
        ["web", "validation set", "4.0000"],
    ]
    suite = read_suite(old_run)
    assert "Sources of" in write_page(suite, old_run / "index.html", {}, []).read_text()


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([], "0 layers, but config.yaml has 3"),
        ([{"num_new_layers": 10**12}], "1000000000000 layers, but config.yaml has 3"),
        ([{"num_new_layers": -1}, {"num_new_layers": 4}], "below 0"),
        ([{"num_new_layers": 0}, {"num_new_layers": 3}], "not numbered from 1"),
        ([{"num_new_layers": 1.5}, {"num_new_layers": 1.5}], "cannot be read"),
        ("many", "cannot be read"),
    ],
)
def test_a_damaged_plan_of_steplm_0_1_is_refused_in_one_line(old_run: Path, stages: object, told: str) -> None:
    (old_run / "plan.json").write_text(json.dumps({"schema_version": 2, "stages": stages}))
    with pytest.raises(SteplmError, match=r"plan\.json cannot be read") as caught:
        load_run(old_run)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_terminal_table_shows_labels_as_they_are(make_record: MakeRecord) -> None:
    console = Console(file=io.StringIO(), width=200)
    render_rich([make_record("STEP [red]")], console)
    text = console.file.getvalue()
    assert "STEP [red]" in text
    assert "55h33m" in text


def test_a_run_that_was_trained_can_be_read_and_drawn(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    result = train(tiny_run(tmp_path / "run"))
    record = load_run(result.run_dir)
    assert (record.label, record.plan.layers) == ("tiny", result.plan.layers)
    assert record.measured_model_state_bytes == result.plan.peak_model_state_bytes
    assert record.validation_perplexity == result.perplexity
    assert record.tokens_seen == sum(stage.tokens for stage in result.plan.stages)
    assert record.elapsed_seconds is not None
    assert [span.end for span in measured_spans(record)] == [result.plan.stages[0].tokens, record.tokens_seen]
    assert run_figure([record], tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("plan.json", "[" * 50_000, "nested too deeply"),
        ("plan.json", "{}", "shape: Field required"),
        ("plan.json", '{"\\ud800": 1}', "surrogates not allowed"),
        ("summary.json", '{"validation_loss": "low"}', "validation_loss: Input should be a valid number"),
        (
            "metrics.jsonl",
            '{"event":"stage_end","stage":1,"tokens_seen":1}\n{"event":"train","stage":1}\n',
            "line 2 of",
        ),
        ("metrics.jsonl", '{"event":"eval","stage":9,"tokens_seen":1,"loss":1,"perplexity":2}\n', "stage 9 of 2"),
        ("metrics.jsonl", "\xff\n", "line 1 of"),
        ("metrics.jsonl", '{"event":"stage_start","stage":1,"measured_bytes":{}}\n', "measured_bytes.weights: Field"),
    ],
)
def test_a_damaged_document_is_named(make_record: MakeRecord, tmp_path: Path, name: str, text: str, told: str) -> None:
    run_dir = write_run(make_record(), tmp_path / "run")
    (run_dir / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(SteplmError, match=name) as caught:
        load_run(run_dir)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
