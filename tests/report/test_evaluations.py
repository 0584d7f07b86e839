"""Evaluations kept as tables come back as they were, wherever they lie below a run, and are parts of its report."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from steplm.cli.report import show_report
from steplm.errors import SteplmError
from steplm.report.evaluations import SEARCH_DEPTH, Evaluation, find_evaluations, save_evaluation
from steplm.report.tables import Cell, Table

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TABLE = Table(
    "Tasks <b>",
    ("task", "score", "Δ"),
    (
        (Cell("one | two"), Cell("51.0 ± 2.0", 0.51, strong=True), Cell("+1.0", 0.01, tone="better")),
        (Cell("mean", "mean"), Cell("7", 7), Cell("–")),
    ),
    "In percent.",
)


def evaluation(folder: Path, title: str = "Zero-shot tasks") -> Evaluation:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bars.png").write_bytes(PIXEL)
    return Evaluation(title, (TABLE,), (folder / "bars.png",))


def test_an_evaluation_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = evaluation(tmp_path / "run" / "evaluation")
    save_evaluation(tmp_path / "run" / "evaluation", "zero_shot", written)
    assert find_evaluations(tmp_path) == [written]
    assert find_evaluations(tmp_path / "run" / "evaluation") == [written]


def test_evaluations_of_one_title_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_evaluation(tmp_path / name, "zero_shot", evaluation(tmp_path / name))
    save_evaluation(tmp_path / "a", "mt_bench", evaluation(tmp_path / "a", "MT-Bench"))
    assert [found.title for found in find_evaluations(tmp_path)] == [
        "MT-Bench",
        "Zero-shot tasks, a",
        "Zero-shot tasks, b",
    ]


def test_what_lies_too_deep_is_not_looked_for(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*map(str, range(SEARCH_DEPTH)))
    save_evaluation(deep, "zero_shot", evaluation(deep))
    assert len(find_evaluations(tmp_path)) == 1
    save_evaluation(deep / "one_more", "zero_shot", evaluation(deep / "one_more"))
    assert len(find_evaluations(tmp_path)) == 1


def test_a_figure_that_is_gone_or_lies_elsewhere_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PIXEL)
    inside = tmp_path / "run"
    path = save_evaluation(inside, "zero_shot", evaluation(inside))
    path.write_text(path.read_text().replace("bars.png", "../secret.png"))
    assert find_evaluations(tmp_path)[0].figures == ()


@pytest.mark.parametrize("text", ["", "{}", '{"title": 1, "tables": [], "figures": []}', "[1]"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "zero_shot.tables.json").write_text(text)
    with pytest.raises(SteplmError, match=r"zero_shot\.tables\.json cannot be read"):
        find_evaluations(tmp_path)


def test_a_report_has_the_evaluations_beside_the_training(make_suite: Callable[..., Path], tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "suite", ("vanilla", "step_2"), (0,), {})
    save_evaluation(suite / "evaluation", "zero_shot", evaluation(suite / "evaluation"))
    show_report(suite, None)
    page, tables = (suite / "report" / "index.html").read_text(), (suite / "report" / "tables.md").read_text()
    assert "<h2>Zero-shot tasks</h2>" in page
    assert 'aria-label="Tasks &lt;b&gt;"' in page
    assert base64.b64encode(PIXEL).decode() in page
    assert "## Zero-shot tasks\n\n**Tasks <b>**\n" in tables
    assert "| one \\| two | **51.0 ± 2.0** | +1.0 |" in tables
    assert "![Zero-shot tasks](../evaluation/bars.png)" in tables
    assert (suite / "report" / "../evaluation/bars.png").is_file()
