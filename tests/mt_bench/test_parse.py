"""The published rules for reading a judge's reply, against real judgments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steplm.mt_bench.parse import parsed, rating, verdict


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[8.5]]", 8.5),
        ("[[3]] at first, [[9]] at last", 3.0),
        ("I say [6].", 6.0),
        ("x[2] = 1, but Rating: [[10]]", 10.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[-3]]", None),
        ("[[rating]]", None),
        ("Rating: 7", None),
        ("", None),
        ("[[5", None),
        ("Rating: [[10]]/10", 10.0),
        ("**Rating: [[8]]**", 8.0),
        ("[[7.]] or [[8]]", 7.0),
        ("[2] is cited, so [[9]]", 9.0),
        ("[[8]", 8.0),
        ("[8]/[10]", 8.0),
        ("[[8]]-[[9]]", 8.0),
        ("[[8-9]]", None),
        ("[[8/10]]", None),
        ("[[ 8 ]]", None),
        ("[[**8**]]", None),
        ("[[8,5]]", None),
        ("[[10.5]]", None),
        ("[[0.9]] [[5]]", None),
        ("<think>[[3]]</think> [[9]]", 3.0),
        ("<think>[3]</think> [[9]]", 9.0),
        ("[[07]]", 7.0),  # which FastChat's parser cannot read
    ],
)
def test_a_rating_is_the_first_number_in_brackets_within_1_to_10(reply: str, expected: float | None) -> None:
    assert rating(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[[A]]", "A"),
        ("so [[B]]", "B"),
        ("[[C]]", "tie"),
        ("[[B]] or [[A]]", "A"),
        ("[A]", None),
        ("$ERROR$", None),
        ("", None),
    ],
)
def test_a_verdict_stands_in_double_brackets(reply: str, expected: str | None) -> None:
    assert verdict(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>[[2]]? No, [[3]].</think>Rating: [[8]]", 8.0),
        ("[[3]] at first, [[9]] at last", 9.0),
        ("[[5]] <think>[[6]]</think>", 5.0),
        ("opened by the template, [[2]]</think> [[7]]", 7.0),
        ("<think>a</think>[[4]]<think>b [[1]]</think> so [6].", 4.0),
        ("<think>cut off in the middle of [[2]]", None),
        ("Rating: [[12]]", None),
    ],
)
def test_the_last_rating_outside_of_a_thought_is_read_if_asked_for(reply: str, expected: float | None) -> None:
    assert parsed("single", reply, "last") == expected


@pytest.mark.parametrize(
    ("reply", "first", "last"),
    [
        ("<think>[[A]]?</think> [[B]]", "A", "B"),
        ("[[B]], then [[A]], at last [[C]]", "A", "tie"),
        ("[[C]] [[B]] [[C]] [[A]] [[B]]", "A", "B"),
        ("<think>[[A]]", "A", None),
    ],
)
def test_the_last_verdict_outside_of_a_thought_is_read_if_asked_for(reply: str, first: str, last: str | None) -> None:
    assert (parsed("pairwise", reply), parsed("pairwise", reply, "last")) == (first, last)


def _real(shared_data: Path, name: str) -> list[dict[str, object]]:
    file = shared_data / "mt_bench/judgments" / name
    if not file.is_file():
        pytest.skip(f"no {file}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_published_score_of_real_judgments_is_read_as_published(shared_data: Path) -> None:
    rows = _real(shared_data, "phi3.gpt-4_single.jsonl")
    assert len(rows) == 160
    assert [rating(str(row["judgment"])) for row in rows] == [row["score"] for row in rows]


def test_every_published_winner_of_real_judgments_is_read_as_published(shared_data: Path) -> None:
    rows = _real(shared_data, "phi3.gpt-4_pair.jsonl")
    assert len(rows) == 75
    for game, sides in (("g1", ("model_1", "model_2")), ("g2", ("model_2", "model_1"))):
        names = {"A": sides[0], "B": sides[1], "tie": "tie", None: "error"}
        read = [names[verdict(str(row[f"{game}_judgment"]))] for row in rows]
        assert read == [row[f"{game}_winner"] for row in rows]
    assert sum(row["g2_winner"] == "error" for row in rows) == 2
