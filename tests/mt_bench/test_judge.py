"""What the judge is asked, and what becomes of its replies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from steplm.mt_bench.data import Turns, load_answers, load_bench
from steplm.mt_bench.journal import Journal
from steplm.mt_bench.judge import (
    Judged,
    Judgment,
    Outcome,
    Replies,
    Reply,
    comparisons,
    fastchat_row,
    gradings,
    judged,
    open_requests,
)


@pytest.fixture
def answers(answer_file: Callable[..., Path]) -> dict[str, dict[int | str, Turns]]:
    return {**load_answers(answer_file("one")), **load_answers(answer_file("two"))}


def test_a_prompt_shows_question_answer_and_reference_and_takes_braces_as_they_are(bench_folder: Path, answers) -> None:
    asked = {
        (*g.models, g.question.question_id, g.turn): g.requests[0]
        for g in gradings(load_bench(bench_folder), answers, "j")
    }
    assert len(asked) == 2 * 5 * 2
    assert asked["one", 1, 1].user.endswith("Describe a pond.: one says 1 {x}")
    assert asked["one", 2, 2].user.endswith("one says 2 {x} / Now in {curly} words. / one adds 2")
    assert "Right: It is five.\n" in asked["two", 3, 1].user
    assert "Right: It is five. then It is ten." in asked["two", 3, 2].user
    assert len({request.key for request in asked.values()}) == len(asked)


def test_a_pair_is_shown_in_both_orders(bench_folder: Path, answers) -> None:
    pairs = comparisons(load_bench(bench_folder), answers, "j")
    assert len(pairs) == 5 * 2
    first, second = (request.user for request in pairs[0].requests)
    assert first.index("one says") < first.index("two says")
    assert second.index("two says") < second.index("one says")


def test_unanswered_questions_and_second_turns_are_not_judged(bench_folder: Path, answers) -> None:
    del answers["one"][1]
    answers["one"][2] = answers["one"][2][:1]
    bench = load_bench(bench_folder)
    of_one = [(g.question.question_id, g.turn) for g in gradings(bench, answers, "j") if g.models == ("one",)]
    assert of_one == [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 1), (5, 2)]
    assert len(comparisons(bench, answers, "j")) == 7


def test_a_request_is_known_by_all_that_is_sent(bench_folder: Path, answers) -> None:
    bench = load_bench(bench_folder)
    key = gradings(bench, answers, "j")[0].requests[0].key
    assert gradings(bench, answers, "other")[0].requests[0].key != key
    answers["one"][1] = ("one says otherwise", "")
    assert gradings(bench, answers, "j")[0].requests[0].key != key


def test_replies_are_found_again_and_unparsable_ones_asked_so_many_times(
    bench_folder: Path, answers, tmp_path: Path
) -> None:
    all_gradings = gradings(load_bench(bench_folder), answers, "j")[:3]
    requests = [grading.requests[0] for grading in all_gradings]
    with Journal(tmp_path / "replies.jsonl", Reply) as journal:
        replies = Replies(journal)
        replies.add(requests[0], Reply("[[4]]"))
        for content in ("no idea", "none"):
            replies.add(requests[1], Reply(content))
    with Journal(tmp_path / "replies.jsonl", Reply) as journal:
        replies = Replies(journal)
        assert open_requests(all_gradings, replies, ask_again=2) == requests[1:]
        assert open_requests(all_gradings, replies, ask_again=1) == requests[2:]
        replies.add(requests[1], Reply("[[9]]"))
        assert open_requests(all_gradings, replies, ask_again=2) == requests[2:]
        assert [each.score for each in judged(all_gradings, replies)] == [4.0, 9.0, None]


def test_a_judge_that_thinks_aloud_is_read_by_its_last_rating_without_being_asked_again(
    bench_folder: Path, answers, tmp_path: Path
) -> None:
    (grading,) = gradings(load_bench(bench_folder), answers, "j")[:1]
    with Journal(tmp_path / "replies.jsonl", Reply) as journal:
        Replies(journal).add(grading.requests[0], Reply("<think>[[2]] or [[3]]?</think> First [[4]], no: [[7]]"))
        scores = {which: judged([grading], Replies(journal, which))[0].score for which in ("first", "last")}
    assert scores == {"first": 2.0, "last": 7.0}


def _judged_pair(first: str | None, second: str | None, comparison: Judgment) -> Judged:
    return Judged(comparison, tuple(Outcome(value, Reply("")) for value in (first, second)))


@pytest.mark.parametrize(
    ("first", "second", "winners", "winner"),
    [
        ("A", "B", ("model_1", "model_1"), "model_1"),
        ("B", "A", ("model_2", "model_2"), "model_2"),
        ("A", "A", ("model_1", "model_2"), "tie"),
        ("tie", "tie", ("tie", "tie"), "tie"),
        ("A", "tie", ("model_1", "tie"), "tie"),
        ("A", None, ("model_1", "error"), None),
    ],
)
def test_a_win_takes_both_orders(bench_folder: Path, answers, first, second, winners, winner) -> None:
    each = _judged_pair(first, second, comparisons(load_bench(bench_folder), answers, "j")[0])
    assert each.winners == winners
    assert each.winner == winner


def test_rows_have_the_fields_of_real_judgments(bench_folder: Path, answers, shared_data: Path) -> None:
    folder = shared_data / "mt_bench/judgments"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    bench = load_bench(bench_folder)
    made = {
        "single": fastchat_row(Judged(gradings(bench, answers, "j")[0], (Outcome(7.0, Reply("[[7]]")),))),
        "pair": fastchat_row(_judged_pair("A", None, comparisons(bench, answers, "j")[0])),
    }
    for kind, row in made.items():
        real = json.loads((folder / f"phi3.gpt-4_{kind}.jsonl").read_text().splitlines()[0])
        assert list(row) == list(real)
        assert {name: type(value) for name, value in row.items()} == {name: type(value) for name, value in real.items()}


def test_the_prompts_of_real_judgments_come_out_as_they_were_sent(shared_data: Path) -> None:
    folder = shared_data / "mt_bench"
    file = folder / "judgments/phi3.gpt-4_pair.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}")
    bench = load_bench(folder)
    answer = load_answers(folder / "answers/phi-3.jsonl")["phi-3"]
    unknown = dict.fromkeys(answer, ("\0", "\0"))  # the other model's answers are not there
    asked = {c.question.question_id: c for c in comparisons(bench, {"1": answer, "2": unknown}, "gpt-4") if c.turn == 1}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        comparison = asked[row["question_id"]]
        assert comparison.requests[0].prompt_name == row["judge"][1]
        for request, name in zip(comparison.requests, ("g1_user_prompt", "g2_user_prompt"), strict=True):
            sent = row[name]
            before, after = request.user.split("\0")
            assert sent.startswith(before)
            assert sent.endswith(after)
    assert len(rows) == 75
