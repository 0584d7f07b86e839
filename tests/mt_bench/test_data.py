"""FastChat's files are read as they are, and what is wrong with one is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.errors import ConfigError, DataError
from steplm.mt_bench.data import PROMPT_NAMES, load_answers, load_bench, prompt_for


def test_questions_references_and_prompts_are_read(bench_folder: Path) -> None:
    bench = load_bench(bench_folder)
    assert [question.question_id for question in bench.questions] == [1, 2, 3, 4, 5]
    assert bench.categories == ("writing", "math", "stem")
    assert bench.references == {3: ("It is five.", "It is ten.")}
    assert set(bench.prompts) == set(PROMPT_NAMES.values())


def test_prompts_beside_the_folder_are_found(bench_folder: Path) -> None:
    (bench_folder / "judge_prompts.jsonl").rename(bench_folder.parent / "judge_prompts.jsonl")
    assert load_bench(bench_folder).prompts


def test_limit_counts_by_category_and_categories_choose(bench_folder: Path) -> None:
    assert [q.question_id for q in load_bench(bench_folder, limit=1).questions] == [1, 3, 4]
    chosen = load_bench(bench_folder, categories=["stem"], limit=5)
    assert [q.question_id for q in chosen.questions] == [4, 5]
    with pytest.raises(ConfigError, match="Did you mean 'writing'"):
        load_bench(bench_folder, categories=["writting"])


def test_a_prompt_goes_by_reference_and_turn(bench_folder: Path) -> None:
    bench = load_bench(bench_folder)
    writing, math = bench.questions[0], bench.questions[2]
    names = [
        prompt_for(bench, kind, question, turn).name
        for kind in ("single", "pairwise")
        for question in (writing, math)
        for turn in (1, 2)
    ]
    plain = ["single-v1", "single-math-v1", "pair-v2", "pair-math-v1"]
    assert names == [name + turn for name in plain for turn in ("", "-multi-turn")]


HUB = "hub://owner/name?revision=0123abc"
OF_THE_HUB = [
    {"prompt_id": 7, "category": "writing", "prompt": ["Describe a pond.", "And a hill."], "reference": []},
    {"prompt_id": 3, "category": "math", "prompt": ["Two and three?", "And twice that?"], "reference": ["5", "10"]},
    {"prompt_id": 8, "category": "math", "prompt": ["Two and two?", "And twice that?"], "reference": ["4", "8"]},
]


@pytest.fixture
def hub(hub_gives: Callable[[list[Any]], list[tuple[Any, Any]]]) -> list[tuple[Any, Any]]:
    """The calls of ``load_dataset``, which gives ``OF_THE_HUB``."""
    return hub_gives(OF_THE_HUB)


def test_questions_come_from_the_hub_at_the_commit_that_is_named(
    bench_folder: Path, hub: list[tuple[Any, Any]]
) -> None:
    bench = load_bench(bench_folder, questions=HUB)
    assert hub == [(("owner/name",), {"streaming": True, "split": "train", "revision": "0123abc"})]
    assert [(q.question_id, q.category, list(q.turns)) for q in bench.questions] == [
        (row["prompt_id"], row["category"], row["prompt"]) for row in OF_THE_HUB
    ]
    assert bench.references == {3: ("It is five.", "It is ten."), 8: ("4", "8")}, "a published reference comes first"
    assert bench.num_own_references == 1
    shutil.rmtree(bench_folder / "reference_answer")
    alone = load_bench(bench_folder, questions=HUB)
    assert (alone.references, alone.num_own_references) == ({3: ("5", "10"), 8: ("4", "8")}, 2)
    assert load_bench(bench_folder, questions=HUB, categories=["writing"]).num_own_references == 0


def test_questions_of_another_file_are_read_and_a_row_that_is_none_is_named(bench_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question_id": 1, "category": "stem", "turns": ["Why?"]}\n')
    bench = load_bench(bench_folder, questions=str(file))
    assert [question.turns for question in bench.questions] == [("Why?",)]
    for row, words in {
        "[1]": "mine.jsonl:2: a JSON list",
        '{"turns": ["?"]}': "mine.jsonl:2: question_id: Field",
        '{"question_id": 2, "category": "stem", "turns": ["?"], "turns": ["!"]}': "2: the key 'turns' is repeated",
    }.items():
        with file.open("a") as stream:
            stream.write(row + "\n")
        with pytest.raises(DataError, match=words):
            load_bench(bench_folder, questions=str(file))
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))


def test_a_question_of_the_hub_without_any_reference_is_named(
    bench_folder: Path, hub: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OF_THE_HUB[2], "reference", ["4"])
    with pytest.raises(DataError, match="no reference for 1 of 2 questions of math, reasoning, coding, the first is 8"):
        load_bench(bench_folder, questions=HUB)


TEMPLATE = '{"name": "single-v1", "system_prompt": "", "prompt_template": "%s"}'
QUESTION = '{"question_id": 1, "category": "a", "turns": ["x"]}'
DAMAGES = {  # file, its text (None: no file), message
    "no questions": ("question.jsonl", None, "question.jsonl.*FastChat's layout"),
    "no turns": (
        "question.jsonl",
        '{"question_id": 1, "category": "a"}',
        r"question\.jsonl, line 1: turns: Field required",
    ),
    "turns of no text": (
        "question.jsonl",
        '{"question_id": 1, "category": "a", "turns": [1]}',
        r"question\.jsonl, line 1: turns\.0: Input should be a valid string",
    ),
    "half a character": (
        "question.jsonl",
        '{"question_id": 1, "category": "a", "turns": ["\\ud83d"]}',
        r"question\.jsonl, line 1: not valid JSON: unexpected end of hex escape",
    ),
    "no JSON": ("question.jsonl", "question", "line 1"),
    "twice": ("question.jsonl", f"{QUESTION}\n{QUESTION}", "several questions 1"),
    "no prompts": ("judge_prompts.jsonl", None, "judge_prompts.jsonl"),
    "strange template": ("judge_prompts.jsonl", TEMPLATE % "{answr}", "asks for {answr}"),
    "torn template": ("judge_prompts.jsonl", TEMPLATE % "{answer", "the template of 'single-v1': expected '}'"),
    "empty references": ("reference_answer/gpt-4.jsonl", "", "holds no answers"),
    "no references": ("reference_answer/gpt-4.jsonl", None, "no .*gpt-4.jsonl"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_message(bench_folder: Path, name: str) -> None:
    file, text, message = DAMAGES[name]
    if text is None:
        (bench_folder / file).unlink()
    else:
        (bench_folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load_bench(bench_folder)


def test_rows_that_are_no_answers_are_refused(tmp_path: Path) -> None:
    for row in ('{"question_id": 1}', '{"question_id": 1, "model_id": "m", "choices": []}', "[1]"):
        (tmp_path / "answers.jsonl").write_text(row + "\n")
        with pytest.raises(DataError):
            load_answers(tmp_path / "answers.jsonl")


def test_the_real_files_are_read(shared_data: Path) -> None:
    bench = load_bench(shared_data / "mt_bench")
    assert (len(bench.questions), len(bench.categories), len(bench.references)) == (80, 8, 30)
    answers = load_answers(shared_data / "mt_bench/answers/phi-3.jsonl")
    assert [len(turns) for turns in answers["phi-3"].values()] == [2] * 80
