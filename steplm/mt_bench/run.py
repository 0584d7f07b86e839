"""The whole benchmark: answers, judgments and scores; every step resumes where it stopped.

DIR/model_answer/NAME.jsonl             answers, in FastChat's format
DIR/replies.jsonl                       every raw reply of a judge; these requests are not sent again
DIR/model_judgment/JUDGE_single.jsonl   derived from the replies, in FastChat's format; also JUDGE_pair.jsonl
DIR/tables.md scores.csv scores.json radar.png
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steplm.errors import ConfigError
from steplm.files import write_atomically, write_errors
from steplm.models.names import short_names
from steplm.mt_bench.client import Failure, JudgeClient, ask_all
from steplm.mt_bench.data import Answer, Answers, Bench, QuestionId, Turns, load_answers, load_bench
from steplm.mt_bench.figure import radar_figure
from steplm.mt_bench.journal import Journal
from steplm.mt_bench.judge import (
    CHARACTERS_PER_TOKEN,
    Judged,
    Judgment,
    Replies,
    Reply,
    comparisons,
    estimated_tokens,
    fastchat_row,
    gradings,
    judged,
    open_requests,
)
from steplm.mt_bench.parse import Which
from steplm.mt_bench.scores import Scores, all_scores
from steplm.mt_bench.tables import all_tables, write_results
from steplm.report.evaluations import Evaluation, save_evaluation
from steplm.report.tables import Table

if TYPE_CHECKING:
    from steplm.mt_bench.answers import AnswerSettings

Mode = Literal["single", "pairwise", "both"]
MODES: dict[Mode, tuple[str, ...]] = {"single": ("single",), "pairwise": ("pairwise",), "both": ("single", "pairwise")}
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Benchmark:
    """What to judge: models that generate answers, by name, and answers made elsewhere."""

    bench: Bench
    models: Mapping[str, str]  # folder or hub name
    given: Answers
    modes: tuple[str, ...]
    output: Path
    questions: str | None  # their source, if not the folder
    max_judge_tokens: int
    which: Which  # which rating of a reply counts

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.models, *self.given)

    @property
    def num_questions(self) -> int:
        return len(self.bench.questions)

    def answer_file(self, name: str) -> Path:
        return self.output / "model_answer" / f"{name}.jsonl"

    def saved_answers(self) -> dict[str, dict[QuestionId, Turns]]:
        """The given answers, and those that an earlier run generated."""
        generated = {name: {a.question_id: a.turns for a in self._generated(name)} for name in self.models}
        return {**generated, **{name: dict(given) for name, given in self.given.items()}}

    def limits(self) -> dict[str, dict[str, int]]:
        """For each model, the number of turns, of turns that reached a length limit, and of truncated prompts."""
        found = {}
        for name in self.models:
            answers = self._generated(name)
            ended = [ended for answer in answers for ended in answer.ended]
            num_cut = sum(number > 0 for answer in answers for number in answer.num_cut_tokens)
            found[name] = {"num_turns": len(ended), "num_unended": ended.count(False), "num_cut_prompts": num_cut}
        return found

    def _generated(self, name: str) -> list[Answer]:
        """Saved answers to the selected questions."""
        if not self.answer_file(name).is_file():
            return []
        asked = {question.question_id for question in self.bench.questions}
        with Journal(self.answer_file(name), Answer) as journal:
            return [answer for answer in journal.rows if answer.question_id in asked]

    def judgments(self, answers: Answers, judge: str) -> list[Judgment]:
        """All judgments to be made of these answers."""
        makers = {"single": gradings, "pairwise": comparisons}
        return [j for mode in self.modes for j in makers[mode](self.bench, answers, judge, self.max_judge_tokens)]


def prepare(
    models: Sequence[str],
    *,
    data: Path,
    output: Path,
    questions: str | None,
    mode: Mode,
    names: Sequence[str],
    answer_files: Sequence[Path],
    categories: Sequence[str],
    limit: int | None,
    max_judge_tokens: int,
    rating: Which,
) -> Benchmark:
    """Read all files, and check what can be checked before spending time and money.

    Raises:
        ConfigError, DataError: the arguments are invalid, or a file is missing or damaged.
    """
    labels = list(names) or [file_name(name.replace("/", "-")) for name in short_names(models)]
    if len(labels) != len(models):
        raise ConfigError(f"{len(models)} models, but {len(labels)} names: give --name once for each model, or never")
    loaded = [load_answers(file) for file in answer_files]
    everyone = [*labels, *(name for answers in loaded for name in answers)]
    if twice := {name for name in everyone if everyone.count(name) > 1}:
        raise ConfigError(f"two models are called {min(twice)!r}. Give others with --name.", name=min(twice))
    for name in labels:
        if not name or file_name(name) != name:
            raise ConfigError(f"{name!r} cannot be the name of a file: use letters, digits, '.', '_', '-' and '='")
    if not everyone:
        raise ConfigError("nothing to judge: name models, or files of answers with --answers")
    if "pairwise" in MODES[mode] and len(everyone) < 2:
        raise ConfigError("a pairwise comparison needs two models or more; there is one")
    bench = load_bench(data, questions=questions, categories=categories, limit=limit)
    of_models = dict(zip(labels, models, strict=True))
    given = {name: turns for answers in loaded for name, turns in answers.items()}
    return Benchmark(bench, of_models, given, MODES[mode], output, questions, max_judge_tokens, rating)


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a run."""

    num_answers: int  # to be generated
    num_requests: int  # to be sent
    num_saved: int  # requests that already have a reply
    prompt_tokens: int  # approximate; an upper bound while answers are missing
    reply_tokens: int


def cost(benchmark: Benchmark, judge: str, *, max_new_tokens: int, ask_again: int) -> Cost:
    """Estimate the cost of a run; an answer not yet generated counts at its maximum length."""
    answers = benchmark.saved_answers()
    num_missing = 0
    for name in benchmark.models:
        for question in benchmark.bench.questions:
            if question.question_id not in answers[name]:
                num_missing += 1
                longest = name.ljust(max_new_tokens * CHARACTERS_PER_TOKEN)
                answers[name][question.question_id] = (longest,) * len(question.turns)
    judgments = benchmark.judgments(answers, judge)
    file = benchmark.output / "replies.jsonl"
    with Journal(file, Reply) if file.is_file() else nullcontext() as journal:  # an estimate creates no file
        to_ask = open_requests(judgments, Replies(journal, benchmark.which), ask_again=ask_again)
    num_requests = len({request.key for judgment in judgments for request in judgment.requests})
    return Cost(num_missing, len(to_ask), num_requests - len(to_ask), *estimated_tokens(to_ask))


def generate_answers(
    benchmark: Benchmark,
    *,
    settings: AnswerSettings,
    batch_size: int,
    device: str,
    chat_template: Path | None,
    progress: Progress,
) -> dict[str, dict[QuestionId, Turns]]:
    """Return all answers, generating those that are not saved yet."""
    from steplm.eval.chat import load_chat_tokenizer
    from steplm.mt_bench.answers import answer_questions

    saved = benchmark.saved_answers()
    for folder in benchmark.models.values():  # check all, before the first takes hours
        load_chat_tokenizer(folder, chat_template)
    answers: dict[str, dict[QuestionId, Turns]] = {}
    for name, folder in benchmark.models.items():
        with progress(f"answers of {name}", benchmark.num_questions - len(saved[name])) as advance:
            answers[name] = answer_questions(
                folder,
                name,
                benchmark.bench.questions,
                benchmark.answer_file(name),
                settings=settings,
                batch_size=batch_size,
                device=device,
                chat_template=chat_template,
                on_answers=advance,
            )
    return {**answers, **{name: dict(given) for name, given in benchmark.given.items()}}


@dataclass(frozen=True)
class Outcome:
    """Scores, and what they cost."""

    scores: Scores
    tables: list[Table]
    files: list[Path]
    failures: list[Failure]
    num_asked: int  # replies received in this run
    prompt_tokens: int  # of these replies, as counted by the server
    completion_tokens: int
    num_thinking: int  # replies with a <think> block


def judge_answers(
    benchmark: Benchmark,
    answers: Answers,
    judge: str,
    make_client: Callable[[], JudgeClient],
    *,
    ask_again: int,
    progress: Progress,
) -> Outcome:
    """Ask the judge for missing replies, then write judgments, tables and the figure.

    Args:
        make_client: called only if there is something to ask.

    Raises:
        JudgeError: the judge cannot be asked; judgments made so far are saved.
    """
    output = benchmark.output
    with Journal(output / "replies.jsonl", Reply) as journal:
        replies = Replies(journal, benchmark.which)
        judgments = benchmark.judgments(answers, judge)
        to_ask = open_requests(judgments, replies, ask_again=ask_again)
        num_before = len(journal.rows)
        failures: list[Failure] = []
        try:
            if to_ask:
                client = make_client()
                with progress(f"judged by {judge}", len(to_ask)) as advance:
                    failures = ask_all(client, to_ask, replies, ask_again=ask_again, on_done=lambda: advance(1))
        finally:
            results = judged(judgments, replies)
            _write_judgments(output / "model_judgment", judge, benchmark.modes, results)
        new = journal.rows[num_before:]
    scores = all_scores(benchmark.bench, benchmark.names, benchmark.modes, results)
    given = [outcome.reply for each in results for outcome in each.outcomes if outcome.reply is not None]
    num_otherwise = sum(reply.temperature is None for reply in given)
    label = f"{judge} at its own temperature" if num_otherwise else judge
    num_thinking = sum("</think>" in reply.content for reply in given)
    if benchmark.which == "last":
        label += ", last rating outside <think>"
    used = (sum(reply.prompt_tokens or 0 for reply in new), sum(reply.completion_tokens or 0 for reply in new))
    about = {
        "judge": judge,
        "num_replies_at_its_own_temperature": num_otherwise,
        "rating": benchmark.which,
        "num_replies_with_thoughts": num_thinking,
        "max_judge_tokens": benchmark.max_judge_tokens,
        "models": {name: benchmark.models.get(name, "given answers") for name in benchmark.names},
        "modes": list(benchmark.modes),
        "questions": benchmark.questions,
        "num_questions": benchmark.num_questions,
        "num_references_of_the_questions_own": benchmark.bench.num_own_references,
        "categories": list(benchmark.bench.categories),
        "answers": benchmark.limits(),
        "requests_without_reply": [
            {"key": f.request.key, "prompt": f.request.prompt_name, "reason": f.reason} for f in failures
        ],
    }
    tables = all_tables(scores, label)
    with write_errors(output):
        figure = radar_figure(scores, output / "radar.png")
        figures = () if figure is None else (figure,)
        save_evaluation(output, "mt_bench", Evaluation("MT-Bench", tuple(tables), figures))
        files = [*write_results(scores, tables, output, about), *figures]
    return Outcome(scores, tables, files, failures, len(new), *used, num_thinking)


def _write_judgments(folder: Path, judge: str, modes: Iterable[str], results: Sequence[Judged]) -> None:
    for mode in modes:
        suffix, num_models = {"single": ("single", 1), "pairwise": ("pair", 2)}[mode]
        rows = (fastchat_row(each) for each in results if len(each.judgment.models) == num_models)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row is not None)
        write_atomically(folder / f"{file_name(judge)}_{suffix}.jsonl", lines)


# --- names ------------------------------------------------------------------------------------------------


def file_name(text: str) -> str:
    """The text as a portable file name, with other characters replaced by ``_``."""
    return re.sub(r"[^\w.=+-]", "_", text).lstrip(".")
