"""Means of what was judged, never of what was not; intervals over questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steplm.mt_bench.data import Bench, Question
from steplm.mt_bench.figure import radar_figure
from steplm.mt_bench.judge import Judged, Judgment, Outcome, Reply, Request
from steplm.mt_bench.scores import Scores, all_scores, interval
from steplm.mt_bench.tables import all_tables

NOTHING = Request("single", "p", "j", "", "")


def _bench(num_questions: int = 4) -> Bench:
    names = ("writing", "math", "stem", "coding")
    return Bench(tuple(Question(n, names[n % 4], ("a", "b")) for n in range(num_questions)), {}, {})


def _single(bench: Bench, model: str, value: Callable[[int, int], float | None]) -> list[Judged]:
    return [
        Judged(Judgment(q, turn, (model,), (NOTHING,)), (Outcome(value(n, turn), Reply("")),))
        for n, q in enumerate(bench.questions)
        for turn in (1, 2)
    ]


def _pairs(bench: Bench, verdicts: dict[tuple[int, int], tuple[str | None, str | None]]) -> list[Judged]:
    return [
        Judged(
            Judgment(bench.questions[n], turn, ("a", "b"), (NOTHING, NOTHING)),
            tuple(Outcome(v, Reply("")) for v in found),
        )
        for (n, turn), found in verdicts.items()
    ]


def test_means_are_of_what_was_judged_and_say_of_how_many() -> None:
    bench = _bench()
    judged = _single(bench, "a", lambda n, turn: None if (n, turn) == (0, 2) else float(n + turn))[:-1]
    scores = all_scores(bench, ["a"], ["single"], judged)
    found = scores.of("score")["a",]
    both = found["all", None]
    assert (both.judged, both.expected, both.unparsable) == (6, 8, 1)
    assert both.mean == pytest.approx((1 + 2 + 3 + 3 + 4 + 4) / 6)
    assert found["writing", None].mean == 1.0
    assert found["coding", 2].mean is None
    assert found["all", 1].mean == 2.5
    assert "6 of 8" in all_tables(scores, "j")[0].markdown()


def test_the_interval_is_that_of_the_t_distribution_where_values_are_many_and_normal() -> None:
    values = np.random.default_rng(1).normal(6, 2, 400)
    mean, low, high = interval({(n, 1): float(v) for n, v in enumerate(values)})
    half = 1.96 * values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_two_equal_turns_of_a_question_are_no_more_evidence_than_one() -> None:
    one = interval({(n, 1): float(n % 7) for n in range(30)})
    two = interval({(n, turn): float(n % 7) for n in range(30) for turn in (1, 2)})
    assert one == two


def test_no_interval_from_one_question() -> None:
    assert interval({(1, 1): 3.0, (1, 2): 5.0}) == (4.0, None, None)
    assert interval({}) == (None, None, None)


def test_differences_are_paired() -> None:
    bench = _bench(40)
    better = _single(bench, "a", lambda n, turn: float(n % 9 + 2))
    worse = _single(bench, "b", lambda n, turn: float(n % 9 + 1))
    gap = all_scores(bench, ["a", "b"], ["single"], better + worse).of("score_difference")["a", "b"]["all", None]
    assert (gap.mean, gap.low, gap.high, gap.judged) == (1.0, 1.0, 1.0, 80)


def test_wins_ties_and_losses_are_counted_and_errors_are_none_of_them() -> None:
    bench = _bench()
    verdicts = {(0, 1): ("A", "B"), (0, 2): ("A", "A"), (1, 1): ("B", "A"), (2, 1): ("A", None), (3, 1): ("tie", "tie")}
    scores = all_scores(bench, ["a", "b"], ["pairwise"], _pairs(bench, verdicts))
    whole = scores.of("win_share")["a", "b"]["all", None]
    assert whole.counts == {"wins": 1, "ties": 2, "losses": 1, "orders_disagree": 1}
    assert (whole.mean, whole.judged, whole.expected, whole.unparsable) == (0.5, 4, 8, 1)
    assert scores.of("score") == {}


def test_real_judgments_give_the_wins_that_counting_gives(shared_data: Path) -> None:
    import json

    file = shared_data / "mt_bench/judgments/phi3.gpt-4_pair.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    bench = Bench(tuple(Question(row["question_id"], "c", ("x",)) for row in rows), {}, {})
    letters = [{"model_1": "A", "model_2": "B"}, {"model_1": "B", "model_2": "A"}]
    verdicts = {
        (n, 1): tuple(
            None if row[f"g{g}_winner"] == "error" else letters[g - 1].get(row[f"g{g}_winner"], "tie") for g in (1, 2)
        )
        for n, row in enumerate(rows)
    }
    scores = all_scores(bench, ["a", "b"], ["pairwise"], _pairs(bench, verdicts))
    whole = scores.of("win_share")["a", "b"]["all", None]
    assert [whole.counts[name] for name in ("wins", "losses", "ties")] == [18, 20, 35]  # 2 of 75 rows are errors
    assert whole.unparsable == 2


def _scores(num_questions: int, models: tuple[str, ...] = ("a", "b")) -> Scores:
    bench = _bench(num_questions)
    found = [each for model in models for each in _single(bench, model, lambda n, turn: float(n % 9 + 1))]
    return all_scores(bench, models, ["single"], found)


def test_the_radar_is_drawn_from_three_categories_on(tmp_path: Path) -> None:
    assert radar_figure(_scores(2), tmp_path / "few.png") is None
    assert radar_figure(_scores(8), tmp_path / "radar.png") == tmp_path / "radar.png"
    assert (tmp_path / "radar.png").stat().st_size > 10_000


def test_the_radar_is_as_wide_as_its_longest_name_needs(tmp_path: Path) -> None:
    names = ("a", "a/very/long/name/of/a/model-with-a-size-and-a-date-1.5B-2025-01-01")
    paths = [radar_figure(_scores(8, (name,)), tmp_path / f"{number}.png") for number, name in enumerate(names)]
    short, long = (Image.open(path).width for path in paths if path is not None)
    assert long > 1.2 * short
