"""A benchmark of a few questions in FastChat's formats, written here, and answers to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

QUESTIONS = [
    (1, "writing", ["Describe a pond.", "Now without water."]),
    (2, "writing", ["Describe a hill.", "Now in {curly} words."]),
    (3, "math", ["What is two and three?", "And twice that?"]),
    (4, "stem", ["Why is ice slippery?", "And snow?"]),
    (5, "stem", ["Why is rust red?", "And copper?"]),
]
REFERENCES = {3: ["It is five.", "It is ten."]}

_SINGLE = "Rate it as [[rating]], 1 to 10.\n"
_PAIR = "Say [[A]], [[B]] or [[C]]."
_REFERENCE = "Right: {ref_answer_1}\n"
_BOTH_REFERENCES = "Right: {ref_answer_1} then {ref_answer_2}\n"
_TALK = "Assistant's text: {question_1} / {answer_1} / {question_2} / {answer_2}"
_SIDES = "Assistant A's text: {answer_a}\nAssistant B's text: {answer_b}\n"
_TALKS = (
    "Assistant A's text: {question_1} / {answer_a_1} / {question_2} / {answer_a_2}\n"
    "Assistant B's text: {question_1} / {answer_b_1} / {question_2} / {answer_b_2}\n"
)
PROMPTS = {
    "single-v1": ("Be fair.", _SINGLE + "{question}: {answer}"),
    "single-math-v1": ("Be fair.", _SINGLE + _REFERENCE + "{question}: {answer}"),
    "single-v1-multi-turn": ("Mind the second.", _SINGLE + _TALK),
    "single-math-v1-multi-turn": ("Mind the second.", _SINGLE + _BOTH_REFERENCES + _TALK),
    "pair-v2": (_PAIR, "{question}\n" + _SIDES),
    "pair-math-v1": (_PAIR, _REFERENCE + "{question}\n" + _SIDES),
    "pair-v2-multi-turn": (_PAIR, _TALKS),
    "pair-math-v1-multi-turn": (_PAIR, _BOTH_REFERENCES + _TALKS),
}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_row(model: str, question_id: int, turns: Sequence[str]) -> dict[str, Any]:
    return {"question_id": question_id, "model_id": model, "choices": [{"index": 0, "turns": list(turns)}]}


# A role, what was said, and a line's end.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(save_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from steplm.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["user: Describe a pond.\nassistant: A small lake."] * 3, 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_model(folder, tokenizer, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def bench_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bench"
    write_rows(
        folder / "question.jsonl",
        [{"question_id": number, "category": category, "turns": turns} for number, category, turns in QUESTIONS],
    )
    write_rows(
        folder / "reference_answer/gpt-4.jsonl",
        [answer_row("gpt-4", number, turns) for number, turns in REFERENCES.items()],
    )
    write_rows(
        folder / "judge_prompts.jsonl",
        [
            {"name": name, "system_prompt": system, "prompt_template": template, "type": name.partition("-")[0]}
            for name, (system, template) in PROMPTS.items()
        ],
    )
    return folder


@pytest.fixture
def answer_file(tmp_path: Path) -> Callable[..., Path]:
    """``answer_file("model")``: two turns of that model's own words for every question."""

    def write(model: str, questions: Sequence[int] = (1, 2, 3, 4, 5)) -> Path:
        rows = [answer_row(model, n, [f"{model} says {n} {{x}}", f"{model} adds {n}"]) for n in questions]
        return write_rows(tmp_path / f"{model}.jsonl", rows)

    return write
