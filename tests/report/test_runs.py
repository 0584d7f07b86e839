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
from steplm.report.figure import measured_spans, run_figure
from steplm.report.runs import COLUMNS, RunRecord, comparison_table, load_run, render_rich
from steplm.training.run import train
from steplm.types import to_json


def write_run(record: RunRecord, run_dir: Path) -> Path:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(record.config))
    (run_dir / "plan.json").write_text(json.dumps(to_json(record.plan)))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in record.events))
    if record.summary is not None:
        (run_dir / "summary.json").write_text(json.dumps(record.summary))
    return run_dir


@pytest.mark.parametrize("until", [0.0, 0.5, 1.0])
def test_a_run_directory_reads_back_finished_or_not(
    make_record: Callable[..., RunRecord], tmp_path: Path, until: float
) -> None:
    record = make_record(until=until)
    assert load_run(write_run(record, tmp_path / "run"), label=record.label) == record


def test_a_run_is_called_by_its_configured_name(make_record: Callable[..., RunRecord], tmp_path: Path) -> None:
    assert load_run(write_run(make_record(), tmp_path / "folder")).label == "run"


def test_a_run_that_has_a_plan_but_no_metrics_yet_has_no_numbers(
    make_record: Callable[..., RunRecord], tmp_path: Path
) -> None:
    run_dir = write_run(make_record(until=0.5), tmp_path / "run")
    (run_dir / "metrics.jsonl").unlink()
    (row,) = comparison_table([load_run(run_dir)])
    assert (row.measured_bytes, row.perplexity, row.tokens, row.elapsed_seconds) == (None, None, 0, None)
    assert row.median_tokens_per_second is None


def test_a_folder_that_holds_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SteplmError, match=r"no run directory: it has no plan\.json"):
        load_run(tmp_path)


def test_the_table_has_the_numbers_of_the_plan_and_of_the_events(
    make_record: Callable[..., RunRecord],
) -> None:
    record = make_record(layers=(6, 4), tokens=(40_000_000, 60_000_000))
    (row,) = comparison_table([record])
    assert row.layers == (6, 4)
    assert row.planned_bytes == max(stage.memory.total_bytes for stage in record.plan.stages)
    assert row.measured_bytes == row.planned_bytes
    assert row.reduction == 1 - row.planned_bytes / record.plan.vanilla_model_state_bytes
    assert row.perplexity == 20.0  # of the export, not of the last evaluation in the loop
    assert row.tokens == 100_000_000
    assert row.median_tokens_per_second == 1200.0  # 160 logged steps at 1100, 240 at 1200


def test_a_run_in_progress_shows_its_latest_evaluation(make_record: Callable[..., RunRecord]) -> None:
    record = make_record(until=0.5)
    (row,) = comparison_table([record])
    assert row.perplexity == record.events_of("eval")[-1]["perplexity"]
    assert row.elapsed_seconds == 50_000.0
    assert row.tokens == 50_000_000


def test_measured_bytes_are_the_largest_stage_not_the_last(make_record: Callable[..., RunRecord]) -> None:
    record = make_record()
    events = [{"event": "stage_start", "stage": i, "measured_bytes": {"total": n}} for i, n in ((1, 30), (2, 20))]
    assert replace(record, events=tuple(events)).measured_model_state_bytes == 30


def test_a_row_has_dashes_for_what_is_absent(make_record: Callable[..., RunRecord]) -> None:
    fresh = replace(make_record("vanilla", layers=(10,), tokens=(100_000_000,), until=0.0), events=())
    (row,) = comparison_table([fresh])
    assert [write(row) for write in COLUMNS.values()] == ["vanilla", "10", "2.85 GiB", *"–––", "0", *"––"]


def test_a_plan_of_another_version_is_an_error_that_names_the_file(
    make_record: Callable[..., RunRecord], tmp_path: Path
) -> None:
    run_dir = write_run(make_record(), tmp_path / "run")
    (run_dir / "plan.json").write_text('{"stages": []}')
    with pytest.raises(SteplmError, match=r"plan\.json cannot be read"):
        load_run(run_dir)


def test_the_terminal_table_shows_labels_as_they_are(make_record: Callable[..., RunRecord]) -> None:
    console = Console(file=io.StringIO(), width=200)
    render_rich([make_record("STEP [red]")], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "STEP [red]" in text
    assert "55h33m" in text


def test_a_run_that_was_trained_can_be_read_and_drawn(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    result = train(tiny_run(tmp_path / "run"))
    record = load_run(result.run_dir)
    (row,) = comparison_table([record])
    assert row.method == "tiny"
    assert row.layers == result.plan.layers
    assert row.measured_bytes == row.planned_bytes == result.plan.peak_model_state_bytes
    assert row.perplexity == result.perplexity
    assert row.tokens == sum(stage.tokens for stage in result.plan.stages)
    assert row.elapsed_seconds is not None
    assert [span.end for span in measured_spans(record)] == [result.plan.stages[0].tokens, row.tokens]
    assert run_figure([record], tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("plan.json", "[" * 50_000, "nested too deeply"),
        ("plan.json", "{}", "shape: Field required"),
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
def test_a_damaged_document_is_named(
    make_record: Callable[..., RunRecord], tmp_path: Path, name: str, text: str, told: str
) -> None:
    run_dir = write_run(make_record(), tmp_path / "run")
    (run_dir / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(SteplmError, match=name) as caught:
        load_run(run_dir)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
