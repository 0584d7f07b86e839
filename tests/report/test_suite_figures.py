"""What the figures of a suite draw: axes, curves over seeds, frontier, windows, places of labels."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.report.charts import documents_chart, question_charts
from steplm.report.curves import FEWEST_POINTS, curve, flops_at, frontier, growth_windows, looks, seconds_at
from steplm.report.labels import HEIGHT, WIDTH, anchor, place_labels
from steplm.report.suite_figures import NAMES, write_figures
from steplm.report.summary import Suite, read_suite


@pytest.fixture(scope="module")
def suite(make_suite: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return read_suite(make_suite(tmp_path_factory.mktemp("figures") / "suite", ("vanilla", "step_3"), (0, 1)))


def test_flops_over_a_run_end_at_the_plans(suite: Suite) -> None:
    for run in suite.runs:
        plan = run.record.plan
        half = plan.stages[0].tokens / 2
        expected = [0, half * plan.stages[0].flops_per_token, plan.training_flops]
        assert flops_at(run.record, [0, half, plan.total_tokens]) == pytest.approx(expected)


def test_time_between_two_logged_steps_is_in_proportion(suite: Suite) -> None:
    record = suite.runs[0].record
    events = [
        {"event": "train", "tokens_seen": 100, "elapsed_seconds": 10.0},
        {"event": "train", "tokens_seen": 200, "elapsed_seconds": 40.0},
    ]
    tokens = (0, 50, 100, 150, 200, 300)
    assert seconds_at(replace(record, events=tuple(events)), tokens) == pytest.approx([0, 5, 10, 25, 40, 40])
    assert seconds_at(replace(record, events=()), [5.0]) == [0.0]


def test_a_curve_is_the_mean_of_its_seeds_within_their_extremes(suite: Suite) -> None:
    entry = suite.entries["step_3"]
    drawn = curve(entry)
    losses = [[e["loss"] for e in run.record.events_of("eval")] for run in entry.runs if run.record is not None]
    assert drawn.validation.loss == pytest.approx([sum(pair) / 2 for pair in zip(*losses, strict=True)])
    series = drawn.validation
    assert all(a <= b <= c for a, b, c in zip(series.low, series.loss, series.high, strict=True))
    assert drawn.num_seeds == 2


def test_growths_stand_on_the_curve_where_a_stage_ends(suite: Suite) -> None:
    drawn = curve(suite.entries["step_3"])
    plan = suite.entries["step_3"].plan
    ends = [plan.stages[0].tokens, plan.stages[0].tokens + plan.stages[1].tokens]
    assert [point.tokens for point in drawn.growths] == ends
    assert set(ends) <= set(drawn.validation.tokens)
    depths = [stage.num_hidden_layers for stage in plan.stages]
    assert drawn.growths[0].label == f"{depths[0]}→{depths[1]} layers"
    assert drawn.growths[0].loss_grown == pytest.approx(drawn.growths[0].loss_merged + 0.3)


def test_a_window_is_cut_at_the_growth(suite: Suite) -> None:
    drawn = curve(suite.entries["step_3"])
    for point, before, after in growth_windows(drawn):
        assert max(tokens for tokens, _ in before) <= point.tokens < min(tokens for tokens, _ in after)
        assert min(len(before), len(after)) >= FEWEST_POINTS


def test_files_show_the_charts_of_the_page(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    words: list[str] = []
    for name in ("annotate", "set_xlabel", "set_ylabel"):
        draw = getattr(Axes, name)

        def note(self: Axes, text: str, *args: Any, draw: Any = draw, **more: Any) -> Any:
            words.append(text)
            return draw(self, text, *args, **more)

        monkeypatch.setattr(Axes, name, note)
    files = write_figures(suite, tmp_path)
    charts = question_charts(suite, suite.record.questions[0], 1, looks(suite))
    assert {chart["kind"] for chart in charts} == {"loss", "tradeoff", "memory", "growth"}
    names = {f"q1_{NAMES[chart['kind']]}" for chart in charts}
    assert set(files) == names | {"q1_loss_flops", "q1_loss_seconds", "learning_rate"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files.values())
    labels = [text for chart in charts for _, text, _ in chart["ends"]]
    labels += [trace["label"]["plain"] for chart in charts for trace in chart["traces"] if "label" in trace]
    titles = [chart["y_title"] for chart in charts] + list(charts[0]["x_titles"].values())
    assert len(labels) == 7  # two in each chart, but for the growths of vanilla
    assert {*labels, *titles} <= set(words)


def test_the_baseline_is_ink_and_no_two_entries_look_alike(suite: Suite) -> None:
    names = [f"m{i}" for i in range(18)]
    base = suite.record.entries[0]
    entries = (base, *(replace(base, name=name, label=name) for name in names))
    look = looks(Suite(replace(suite.record, entries=entries), ()))
    assert look["vanilla"].color is None
    assert len({(style.color, style.dash) for style in look.values()}) == 19


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12))
def test_the_frontier_is_what_nothing_beats_in_both(points: list[tuple[int, int]]) -> None:
    unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert frontier(points) == sorted(unbeaten)


def test_labels_cover_neither_each_other_nor_points() -> None:
    generator = random.Random(1)
    points = [(generator.uniform(100, 700), generator.uniform(80, 320)) for _ in range(12)]
    points[1] = points[0]
    texts = [f"method {i}" for i in range(12)]
    offsets = place_labels(points, texts, (800, 400), font_size=10)
    boxes = []
    for (x, y), (dx, dy), text in zip(points, offsets, texts, strict=True):
        width, height = WIDTH * 10 * len(text), HEIGHT * 10
        left = x + dx - {"left": 0.0, "center": width / 2, "right": width}[anchor(dx)]
        boxes.append((left, y + dy - height / 2, left + width, y + dy + height / 2))
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in combinations(boxes, 2))
    assert not any(a[0] < x < a[2] and a[1] < y < a[3] for a in boxes for x, y in points)
    assert all(a[0] >= 0 and a[2] <= 800 and a[1] >= 0 and a[3] <= 400 for a in boxes)


def test_document_lengths_are_drawn_as_shares_and_left_out_where_no_run_has_them(suite: Suite, tmp_path: Path) -> None:
    def with_counts(counts: list[int]) -> Suite:
        event = {"event": "data", "tokens_seen": 0, "documents_by_length": counts}
        records = [(run, run.record) for run in suite.runs if run.record is not None]
        runs = [replace(run, record=replace(record, events=(event, *record.events))) for run, record in records]
        return Suite(suite.record, tuple(runs))

    assert documents_chart(suite) is None
    assert documents_chart(with_counts([0, 0, 1])) is None  # one document has no distribution
    measured = with_counts([0, 0, 100, 0, 300])
    chart = documents_chart(measured)
    assert chart["traces"][0]["x"] == [2.5, 3.5, 4.5]
    assert chart["traces"][0]["y"] == [25, 0, 75]
    assert chart["traces"][0]["hover"][2] == "16 to 31 tokens<br>300 documents, 75.0%"
    assert dict(zip(chart["x_ticks"], chart["x_tick_labels"], strict=True)) == {2: "4", 3: "8", 4: "16", 5: "32"}
    assert chart["about"].startswith("400 training documents")
    assert "document_lengths" in write_figures(measured, tmp_path)
    assert "document_lengths" not in write_figures(suite, tmp_path / "without")
