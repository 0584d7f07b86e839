"""FastChat's files are read as they are, and what is wrong with one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

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
    assert names == [
        "single-v1",
        "single-v1-multi-turn",
        "single-math-v1",
        "single-math-v1-multi-turn",
        "pair-v2",
        "pair-v2-multi-turn",
        "pair-math-v1",
        "pair-math-v1-multi-turn",
    ]


def _without_a_reference(folder: Path) -> None:
    (folder / "reference_answer/gpt-4.jsonl").write_text("")


def _with_a_strange_template(folder: Path) -> None:
    row = {"name": "single-v1", "system_prompt": "", "prompt_template": "{answr}"}
    (folder / "judge_prompts.jsonl").write_text(json.dumps(row) + "\n")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no questions file": (lambda f: (f / "question.jsonl").unlink(), "question.jsonl.*FastChat's layout"),
    "no turns": (
        lambda f: (f / "question.jsonl").write_text('{"question_id": 1, "category": "a"}\n'),
        "needs question_id",
    ),
    "turns of no text": (
        lambda f: (f / "question.jsonl").write_text('{"question_id": 1, "category": "a", "turns": [1]}\n'),
        "needs question_id",
    ),
    "twice": (
        lambda f: (f / "question.jsonl").write_text('{"question_id": 1, "category": "a", "turns": ["x"]}\n' * 2),
        "several questions 1",
    ),
    "no JSON": (lambda f: (f / "question.jsonl").write_text("question\n"), "line 1"),
    "no prompts": (lambda f: (f / "judge_prompts.jsonl").unlink(), "judge_prompts.jsonl"),
    "strange template": (_with_a_strange_template, "asks for {answr}"),
    "empty references": (_without_a_reference, "holds no answers"),
    "no references": (lambda f: (f / "reference_answer/gpt-4.jsonl").unlink(), "no .*gpt-4.jsonl"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_message(bench_folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(bench_folder)
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
