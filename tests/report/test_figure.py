"""Figures: what is written on them. How they look, a person must judge."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from method_figure import method_figure

from steplm.report.figure import measured_spans, run_figure, smoothed
from steplm.report.runs import RunRecord
from steplm.report.style import spread
from steplm.units import percent

MakeRecord = Callable[..., RunRecord]

PNG = b"\x89PNG\r\n\x1a\n"


def texts_of(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text())


def test_one_run_shows_growth_kinds_and_the_saving(make_record: MakeRecord, tmp_path: Path) -> None:
    texts = texts_of(run_figure([make_record("STEP")], tmp_path / "run.svg"))
    words = {"6→10 layers", "STEP", "perplexity 20.00", "vanilla 2.85 GiB", "−26.3%", "measured", "planned"}
    assert words <= set(texts)
    assert {text.split()[0] for text in texts} >= {"weights", "gradients", "optimizer", "adapters"}


def test_several_runs_are_told_apart_by_name(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [make_record("STEP"), make_record("vanilla", (10,), (100_000_000,))]
    texts = texts_of(run_figure(records, tmp_path / "runs.svg"))
    assert texts.count("STEP") == texts.count("vanilla") == 2  # once a panel
    assert "peak 2.10 GiB, −26.3%" in texts
    assert "peak 2.85 GiB" in texts


@pytest.mark.parametrize("until", [0.0, 0.3, 0.7])
def test_a_run_in_progress_can_be_drawn(make_record: MakeRecord, tmp_path: Path, until: float) -> None:
    record = make_record(until=until)
    for number, records in enumerate(([record], [record, replace(record, events=())])):
        path = run_figure(records, tmp_path / f"new/folder/{number}.png")
        assert path.read_bytes().startswith(PNG)


def test_the_last_few_steps_of_a_stage_are_not_a_point_of_their_own(make_record: MakeRecord) -> None:
    record = make_record()
    train = [
        {"event": "train", "stage": stage, "tokens_seen": tokens, "loss": loss}
        for stage, tokens, loss in [
            (1, 100, 5.0),
            (1, 200, 4.0),
            (1, 220, 7.0),
            (2, 320, 3.0),
            (2, 330, 9.0),
            (2, 430, 2.0),
        ]
    ]
    points = replace(record, events=tuple(train)).training_losses
    assert points == [(100, 5.0, 1), (220, pytest.approx(4.5), 1), (330, pytest.approx(39 / 11), 2), (430, 2.0, 2)]
    assert replace(record, events=()).training_losses == []


def test_drawing_leaves_the_settings_of_matplotlib_alone(make_record: MakeRecord, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    run_figure([make_record()], tmp_path / "run.png")
    assert dict(matplotlib.rcParams) == before


def test_the_method_figure_names_stages_and_costs(tmp_path: Path) -> None:
    texts = texts_of(method_figure(tmp_path / "method.svg"))
    assert {"Stage 1", "Stage 2", "Stage 3", "Result", "frozen: 2 bytes a parameter"} <= set(texts)


def test_measured_spans_cover_the_run_without_gaps(make_record: MakeRecord) -> None:
    record = make_record(until=0.7)
    first, second = measured_spans(record)
    growth = record.plan.stages[0].tokens
    assert (first.start, first.end, second.start, second.end) == (0, growth, growth, record.tokens_seen)
    for span, stage in zip((first, second), record.plan.stages, strict=True):
        assert sum(span.bytes_by_kind.values()) == stage.memory.total_bytes


def test_percent_has_a_proper_minus() -> None:
    assert (percent(-0.426), percent(0.1)) == ("−42.6%", "+10.0%")


def test_smoothing_keeps_a_constant_and_the_place_of_a_peak() -> None:
    assert smoothed([2.0] * 9, 1.5) == pytest.approx([2.0] * 9)
    assert smoothed([1.0, 5.0, 2.0], 0.0) == [1.0, 5.0, 2.0]
    peak = smoothed([0.0] * 5 + [1.0] + [0.0] * 5, 1.0)
    assert max(range(11), key=peak.__getitem__) == 5
    assert peak[4] == pytest.approx(peak[6])
    assert smoothed([], 1.0) == []


def test_labels_are_pushed_apart_but_stay_in_order_and_inside() -> None:
    placed = spread([0.5, 0.52, 0.1, 0.99], gap=0.2, lowest=0.0, highest=1.0)
    low_to_high = sorted(placed)
    assert all(b - a >= 0.2 - 1e-12 for a, b in pairwise(low_to_high))
    assert low_to_high == [placed[2], placed[0], placed[1], placed[3]]
    assert placed[2] == 0.1
    assert max(placed) <= 1.0
    assert spread([], 0.1) == []
