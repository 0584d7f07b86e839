"""What the judge is asked, and what its replies amount to.

A request is known by a hash of all that is sent, so a reply is found again whatever else has changed, and a reply to
another text is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from steplm.mt_bench.data import Answers, Bench, Question, Turns, prompt_for
from steplm.mt_bench.journal import Journal
from steplm.mt_bench.parse import Which, parsed

TEMPERATURE = 0
MAX_TOKENS = 2048  # of a reply, as published
CHARACTERS_PER_TOKEN = 4  # of English, about
USUAL_REPLY_TOKENS = 200  # mean of GPT-4's replies to these prompts


@dataclass(frozen=True)
class Request:
    """One message to the judge; equal requests are asked once."""

    kind: str  # "single" or "pairwise"
    prompt_name: str
    judge: str
    system: str
    user: str
    max_tokens: int = MAX_TOKENS  # of the reply

    @property
    def key(self) -> str:
        sent = [self.judge, self.system, self.user, TEMPERATURE, self.max_tokens]
        return hashlib.sha256(json.dumps(sent).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Grading:
    """One answer, to be given 1 to 10."""

    question: Question
    turn: int
    model: str
    request: Request

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    @property
    def requests(self) -> tuple[Request, ...]:
        return (self.request,)


@dataclass(frozen=True)
class Comparison:
    """Two answers, shown in both orders."""

    question: Question
    turn: int
    model_1: str
    model_2: str
    first: Request  # model_1 is A
    second: Request  # model_2 is A

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model_1, self.model_2)

    @property
    def requests(self) -> tuple[Request, ...]:
        return (self.first, self.second)


def gradings(bench: Bench, answers: Answers, judge: str, max_tokens: int = MAX_TOKENS) -> list[Grading]:
    """All single gradings of the answers that there are: model by model, question by question, turn by turn."""
    return [
        Grading(question, turn, model, _request(bench, judge, max_tokens, "single", question, turn, {"answer": turns}))
        for model, given in answers.items()
        for question in bench.questions
        for turn in range(1, len(question.turns) + 1)
        if len(turns := given.get(question.question_id, ())) >= turn
    ]


def comparisons(bench: Bench, answers: Answers, judge: str, max_tokens: int = MAX_TOKENS) -> list[Comparison]:
    """Every model against every other, on the questions that both have answered."""
    found = []
    for one, two in combinations(answers, 2):
        for question in bench.questions:
            turns_1, turns_2 = (answers[model].get(question.question_id, ()) for model in (one, two))
            for turn in range(1, min(len(question.turns), len(turns_1), len(turns_2)) + 1):
                first, second = (
                    _request(bench, judge, max_tokens, "pairwise", question, turn, {"answer_a": a, "answer_b": b})
                    for a, b in ((turns_1, turns_2), (turns_2, turns_1))
                )
                found.append(Comparison(question, turn, one, two, first, second))
    return found


def _request(
    bench: Bench, judge: str, max_tokens: int, kind: str, question: Question, turn: int, said: dict[str, Turns]
) -> Request:
    prompt = prompt_for(bench, kind, question, turn)
    sides = {"question": question.turns, **said}
    if turn == 1:
        fields = {name: turns[0] for name, turns in sides.items()}
    else:
        fields = {f"{name}_{number}": turns[number - 1] for name, turns in sides.items() for number in (1, 2)}
    reference = bench.references.get(question.question_id, ())
    # The second may be missing: then nothing asks for it.
    fields |= {f"ref_answer_{number}": text for number, text in enumerate((*reference, "", "")[:2], 1)}
    return Request(kind, prompt.name, judge, prompt.system_prompt, prompt.prompt_template.format(**fields), max_tokens)


# --- replies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """As it is saved: ``key`` is its request's, ``judge`` the name of the judge and of the prompt."""

    content: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tstamp: float = 0.0
    temperature: float | None = TEMPERATURE  # that was asked for; None: none, as the judge takes its own alone
    key: str = ""
    judge: tuple[str, str] = ("", "")


class Replies:
    """Every reply that was ever got, by request, on the disk.

    Args:
        journal: None: there are none, and none will be added.
        which: rating of a reply counts.
    """

    def __init__(self, journal: Journal[Reply] | None, which: Which = "first") -> None:
        self._journal = journal
        self._which = which
        self._of: dict[str, list[Reply]] = {}
        for reply in journal.rows if journal else ():
            self._of.setdefault(reply.key, []).append(reply)

    def add(self, request: Request, reply: Reply) -> None:
        """Save it; on return it survives a power cut."""
        assert self._journal is not None
        reply = replace(reply, key=request.key, judge=(request.judge, request.prompt_name))
        self._journal.append(reply)
        self._of.setdefault(request.key, []).append(reply)

    def to(self, request: Request) -> list[Reply]:
        return self._of.get(request.key, [])

    def is_open(self, request: Request, ask_again: int) -> bool:
        """Whether it is still to be asked: no reply can be read yet, and there are at most ``ask_again``."""
        return len(self.to(request)) <= ask_again and self.outcome(request).value is None

    def outcome(self, request: Request) -> Outcome:
        """The first reply that can be read; else the last, which cannot; else none."""
        replies = self.to(request)
        for reply in replies:
            if (value := parsed(request.kind, reply.content, self._which)) is not None:
                return Outcome(True, value, reply)
        return Outcome(bool(replies), None, replies[-1] if replies else None)


@dataclass(frozen=True)
class Outcome:
    """``value`` is ``None`` where there is no reply, or none that can be read."""

    answered: bool
    value: float | str | None
    reply: Reply | None

    @property
    def unparsable(self) -> bool:
        return self.answered and self.value is None


def open_requests(judgments: Iterable[Grading | Comparison], replies: Replies, *, ask_again: int) -> list[Request]:
    """What is still to be asked: no reply yet, or only unparsable ones and fewer than ``1 + ask_again`` of them."""
    wanted = {request.key: request for judgment in judgments for request in judgment.requests}
    return [request for request in wanted.values() if replies.is_open(request, ask_again)]


def estimated_tokens(requests: Sequence[Request]) -> tuple[int, int]:
    """About how many tokens these requests send, and how many come back if the judge is as brief as GPT-4."""
    characters = sum(len(request.system) + len(request.user) for request in requests)
    return characters // CHARACTERS_PER_TOKEN, USUAL_REPLY_TOKENS * len(requests)


# --- FastChat's format ------------------------------------------------------------------------------------

_UNPARSABLE_SCORE = -1  # FastChat's mark; its show_result leaves such rows out
_WINNERS = {"A": ("model_1", "model_2"), "B": ("model_2", "model_1"), "tie": ("tie", "tie"), None: ("error", "error")}


@dataclass(frozen=True)
class Judged:
    """A judgment with the outcome of its requests."""

    judgment: Grading | Comparison
    outcomes: tuple[Outcome, ...] = field(default=())

    @property
    def answered(self) -> bool:
        return all(outcome.answered for outcome in self.outcomes)

    @property
    def score(self) -> float | None:
        """1 to 10 of a grading; ``None`` where it is missing or cannot be read."""
        value = self.outcomes[0].value
        return value if isinstance(value, float) else None

    @property
    def winners(self) -> tuple[str, str]:
        """Of a comparison in both orders: ``model_1``, ``model_2``, ``tie`` or ``error``."""
        first, second = (outcome.value for outcome in self.outcomes)
        return _WINNERS[first][0], _WINNERS[second][1]  # type: ignore[index]

    @property
    def winner(self) -> str | None:
        """A win only where both orders agree, else a tie; ``None`` where one is missing or cannot be read."""
        first, second = self.winners
        if "error" in (first, second):
            return None
        return first if first == second else "tie"


def judged(judgments: Iterable[Grading | Comparison], replies: Replies) -> list[Judged]:
    """Each judgment with what the replies say of it."""
    return [Judged(each, tuple(map(replies.outcome, each.requests))) for each in judgments]


def fastchat_row(each: Judged) -> dict[str, Any] | None:
    """A row of FastChat's ``model_judgment`` files; ``None`` where a reply is missing."""
    if not each.answered:
        return None
    judgment = each.judgment
    replies = [outcome.reply or Reply("") for outcome in each.outcomes]
    tail = {"turn": judgment.turn, "tstamp": max(reply.tstamp for reply in replies)}
    if isinstance(judgment, Grading):
        score = each.score
        return {
            "question_id": judgment.question.question_id,
            "model": judgment.model,
            "judge": [judgment.request.judge, judgment.request.prompt_name],
            "user_prompt": judgment.request.user,
            "judgment": replies[0].content,
            "score": _UNPARSABLE_SCORE if score is None else int(score) if score.is_integer() else score,
            **tail,
        }
    return {
        "question_id": judgment.question.question_id,
        "model_1": judgment.model_1,
        "model_2": judgment.model_2,
        "g1_winner": each.winners[0],
        "g2_winner": each.winners[1],
        "judge": [judgment.first.judge, judgment.first.prompt_name],
        "g1_user_prompt": judgment.first.user,
        "g1_judgment": replies[0].content,
        "g2_user_prompt": judgment.second.user,
        "g2_judgment": replies[1].content,
        **tail,
    }
