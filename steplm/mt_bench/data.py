"""FastChat's files: questions, reference answers, judge prompts and model answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from steplm.data.sources import find_sources
from steplm.errors import ConfigError, DataError
from steplm.mt_bench.journal import Row, parsed_row, read_rows
from steplm.units import nearest

QuestionId = int | str
Turns = tuple[str, ...]  # what one side said, turn by turn
Answers = Mapping[str, Mapping[QuestionId, Turns]]  # by model and question

NUM_TURNS = 2
CATEGORIES_WITH_REFERENCE = ("math", "reasoning", "coding")  # as published; references in others are not shown
# Keyed by kind of judgment, whether there is a reference, and turn.
PROMPT_NAMES = {
    ("single", False, 1): "single-v1",
    ("single", True, 1): "single-math-v1",
    ("single", False, 2): "single-v1-multi-turn",
    ("single", True, 2): "single-math-v1-multi-turn",
    ("pairwise", False, 1): "pair-v2",
    ("pairwise", True, 1): "pair-math-v1",
    ("pairwise", False, 2): "pair-v2-multi-turn",
    ("pairwise", True, 2): "pair-math-v1-multi-turn",
}
_OTHER_NAMES = (("question_id", "prompt_id"), ("turns", "prompt"))  # FastChat's names, and those of datasets on the hub
WHERE_TO_GET = (
    "The folder has FastChat's layout (github.com/lm-sys/FastChat, fastchat/llm_judge/data): question.jsonl, "
    "reference_answer/gpt-4.jsonl and judge_prompts.jsonl, the last in the folder or beside it"
)


@dataclass(frozen=True)
class Question:
    question_id: QuestionId
    category: str
    turns: Annotated[Turns, Field(min_length=1)]
    own_reference: Turns = ()  # from the question's own dataset


@dataclass(frozen=True)
class JudgePrompt:
    name: str
    system_prompt: str
    prompt_template: str  # for ``str.format``


@dataclass(frozen=True, kw_only=True)
class Choice:
    index: int = 0
    turns: Turns


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A row of FastChat's ``model_answer`` format, with further fields for answers made here."""

    question_id: QuestionId
    answer_id: str = ""
    model_id: str
    choices: Annotated[tuple[Choice, ...], Field(min_length=1)]  # only the first is used
    tstamp: float = 0.0
    num_tokens: tuple[int, ...] = ()  # per turn, like the two below
    ended: tuple[bool, ...] = ()  # at an end token, not at the limit
    num_cut_tokens: tuple[int, ...] = ()  # dropped from the start of the prompt
    made_by: dict[str, Any] = field(default_factory=dict)  # everything that the answer depends on

    @property
    def turns(self) -> Turns:
        return self.choices[0].turns


@dataclass(frozen=True)
class Bench:
    """The questions, and what it takes to judge them."""

    questions: tuple[Question, ...]
    references: Mapping[QuestionId, Turns]  # for the categories that are judged against one
    prompts: Mapping[str, JudgePrompt]
    num_own_references: int = 0  # references that are the questions' own, not published ones

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(question.category for question in self.questions))


def load_bench(
    folder: Path, *, questions: str | None = None, categories: Sequence[str] = (), limit: int | None = None
) -> Bench:
    """Load questions, with the references and prompts needed to judge them.

    Args:
        folder: in FastChat's layout; see ``WHERE_TO_GET``.
        questions: used instead of the folder's: a file, or ``hub://OWNER/NAME?revision=COMMIT``. Columns are
            FastChat's, or ``prompt_id`` and ``prompt`` for ``question_id`` and ``turns``. A question without a
            reference in the folder is judged against its own, from the column ``reference``.
        categories: only these; default: all.
        limit: number of questions per category, from the first; default: all.

    Raises:
        DataError: a file is missing or damaged, a reference is missing, or there are no questions.
        HubUnavailable: the questions could not be fetched from the hub.
        ConfigError: a category is unknown.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}. {WHERE_TO_GET}.", path=str(folder))
    asked = _selected(_questions(folder, questions), categories, limit)
    references, num_own = _references(folder, asked)
    prompt_file = next((p for p in (folder, folder.parent) if (p / "judge_prompts.jsonl").is_file()), folder)
    prompts = _rows(prompt_file / "judge_prompts.jsonl", JudgePrompt)
    for prompt in prompts:
        _check_template(prompt)
    return Bench(asked, references, {prompt.name: prompt for prompt in prompts}, num_own)


def load_answers(path: Path) -> dict[str, dict[QuestionId, Turns]]:
    """Load answers by model and question from a file in FastChat's ``model_answer`` format; the first choice counts.

    Raises:
        DataError: the file does not exist or is empty, or a row is not an answer.
    """
    answers: dict[str, dict[QuestionId, Turns]] = {}
    for answer in read_rows(path, Answer):
        answers.setdefault(answer.model_id, {})[answer.question_id] = answer.turns
    if not answers:
        raise DataError(f"{path} holds no answers", path=str(path))
    return answers


def prompt_for(bench: Bench, kind: str, question: Question, turn: int) -> JudgePrompt:
    """The judge prompt for a question's turn, which depends on whether it is judged against a reference.

    Raises:
        DataError: the prompt is not in the file.
    """
    name = PROMPT_NAMES[kind, question.category in CATEGORIES_WITH_REFERENCE, turn]
    if name not in bench.prompts:
        raise DataError(f"judge_prompts.jsonl has no prompt {name!r}. {WHERE_TO_GET}.", name=name)
    return bench.prompts[name]


def _rows(path: Path, kind: type[Row]) -> list[Row]:
    if not path.is_file():
        raise DataError(f"no file {path}. {WHERE_TO_GET}.", path=str(path))
    return read_rows(path, kind)


def _questions(folder: Path, entry: str | None) -> list[Question]:
    if entry is None:
        return [_two_turns(question) for question in _rows(folder / "question.jsonl", Question)]
    adapter = TypeAdapter(Question)
    found = []
    for source in find_sources([entry]):
        for place, row in source.records():
            where = f"{source.name}:{place}"
            if not isinstance(row, Mapping):
                raise DataError(f"{where}: {row if isinstance(row, Exception) else 'not a question'}")
            named = {**row, **{new: row[old] for new, old in _OTHER_NAMES if old in row}}
            question = _two_turns(parsed_row(where, json.dumps(named, default=str), adapter))
            reference = row.get("reference")
            is_text = isinstance(reference, list) and all(isinstance(text, str) for text in reference)
            found.append(replace(question, own_reference=tuple(reference or ()) if is_text else ()))
    return found


def _two_turns(question: Question) -> Question:
    return replace(question, turns=question.turns[:NUM_TURNS])


def _selected(questions: list[Question], categories: Sequence[str], limit: int | None) -> tuple[Question, ...]:
    if twice := [identity for identity, n in Counter(q.question_id for q in questions).items() if n > 1]:
        raise DataError(f"question.jsonl has several questions {twice[0]!r}", question_id=twice[0])
    known = tuple(dict.fromkeys(question.category for question in questions))
    for name in categories:
        if name not in known:
            raise ConfigError(f"no question is of category {name!r}.{nearest(name, known)}", category=name)
    seen: Counter[str] = Counter()
    kept = []
    for question in questions:
        if categories and question.category not in categories:
            continue
        seen[question.category] += 1
        if limit is None or seen[question.category] <= limit:
            kept.append(question)
    if not kept:
        raise DataError("question.jsonl holds no questions")
    return tuple(kept)


def _references(folder: Path, questions: Sequence[Question]) -> tuple[dict[QuestionId, Turns], int]:
    """References of the questions that need one, and how many are the questions' own; prefers GPT-4's, as published."""
    needed = [question for question in questions if question.category in CATEGORIES_WITH_REFERENCE]
    if not needed:
        return {}, 0
    own = {q.question_id: q.own_reference for q in needed if len(q.own_reference) >= len(q.turns)}
    if len(own) == len(needed) and not (folder / "reference_answer").is_dir():
        return own, len(own)
    files = sorted((folder / "reference_answer").glob("*.jsonl"))
    file = next((f for f in files if f.stem == "gpt-4"), files[0] if len(files) == 1 else None)
    if file is None:
        found = f"; found {', '.join(f.name for f in files)}" if files else ""
        raise DataError(f"no {folder / 'reference_answer' / 'gpt-4.jsonl'}{found}. {WHERE_TO_GET}.", path=str(folder))
    answers = {number: turns for of_model in load_answers(file).values() for number, turns in of_model.items()}
    published = {q.question_id for q in needed if len(answers.get(q.question_id, ())) >= len(q.turns)}
    answers |= {number: turns for number, turns in own.items() if number not in published}
    if missing := [q.question_id for q in needed if len(answers.get(q.question_id, ())) < len(q.turns)]:
        raise DataError(
            f"{file} has no reference for {len(missing)} of {len(needed)} questions of "
            f"{', '.join(CATEGORIES_WITH_REFERENCE)}, the first is {missing[0]!r}. Add them, or choose other "
            "--categories.",
            question_id=missing[0],
        )
    return {q.question_id: answers[q.question_id] for q in needed}, len(own.keys() - published)


def _check_template(prompt: JudgePrompt) -> None:
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt.prompt_template) if name is not None}
    except ValueError as error:
        raise DataError(f"judge_prompts.jsonl: the template of {prompt.name!r}: {error}", name=prompt.name) from None
    if prompt.name in PROMPT_NAMES.values() and (unknown := fields - _fields(prompt.name)):
        raise DataError(
            f"judge_prompts.jsonl: the template of {prompt.name!r} asks for {{{min(unknown)}}}, which is none of "
            f"{', '.join(sorted(_fields(prompt.name)))}",
            name=prompt.name,
        )


def _fields(name: str) -> set[str]:
    kind, has_reference, turn = next(key for key, value in PROMPT_NAMES.items() if value == name)
    sides = ("answer",) if kind == "single" else ("answer_a", "answer_b")
    numbers = ("_1", "_2") if turn == 2 else ("",)
    fields = {f"{field}{number}" for field in ("question", *sides) for number in numbers}
    return fields | ({"ref_answer_1", "ref_answer_2"} if has_reference else set())
