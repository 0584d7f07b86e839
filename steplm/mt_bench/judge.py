"""Requests to the judge, and the outcomes of its replies.

A request is identified by a hash of everything that is sent, so that a saved reply is found again whatever else has
changed, and a reply to a different text is never mistaken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from steplm.mt_bench.data import Answers, Bench, Question, Turns, prompt_for
from steplm.mt_bench.journal import Journal
from steplm.mt_bench.parse import Which, parsed

TEMPERATURE = 0
MAX_TOKENS = 2048  # of a reply, as published
CHARACTERS_PER_TOKEN = 4  # approximately, in English
USUAL_REPLY_TOKENS = 200  # mean length of GPT-4's replies to these prompts


@dataclass(frozen=True)
class Request:
    """One message to the judge; equal requests are sent once."""

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
class Judgment:
    """One request to grade an answer from 1 to 10, or two to compare a pair in both orders, the first model's first."""

    question: Question
    turn: int
    models: tuple[str, ...]
    requests: tuple[Request, ...]


def gradings(bench: Bench, answers: Answers, judge: str, max_tokens: int = MAX_TOKENS) -> list[Judgment]:
    """Single gradings of all available answers, ordered by model, question and turn."""
    return [
        Judgment(question, turn, (model,), (_request(bench, judge, max_tokens, question, turn, {"answer": turns}),))
        for model, given in answers.items()
        for question in bench.questions
        for turn in range(1, len(question.turns) + 1)
        if len(turns := given.get(question.question_id, ())) >= turn
    ]


def comparisons(bench: Bench, answers: Answers, judge: str, max_tokens: int = MAX_TOKENS) -> list[Judgment]:
    """Every model against every other, on the questions that both have answered."""
    found = []
    for pair in combinations(answers, 2):
        for question in bench.questions:
            one, two = (answers[model].get(question.question_id, ()) for model in pair)
            for turn in range(1, min(len(question.turns), len(one), len(two)) + 1):
                orders = ({"answer_a": one, "answer_b": two}, {"answer_a": two, "answer_b": one})
                requests = tuple(_request(bench, judge, max_tokens, question, turn, order) for order in orders)
                found.append(Judgment(question, turn, pair, requests))
    return found


def _request(
    bench: Bench, judge: str, max_tokens: int, question: Question, turn: int, answers: dict[str, Turns]
) -> Request:
    kind = "single" if len(answers) == 1 else "pairwise"
    prompt = prompt_for(bench, kind, question, turn)
    sides = {"question": question.turns, **answers}
    if turn == 1:
        fields = {name: turns[0] for name, turns in sides.items()}
    else:
        fields = {f"{name}_{number}": turns[number - 1] for name, turns in sides.items() for number in (1, 2)}
    reference = bench.references.get(question.question_id, ())
    # The second reference may be missing; then no template uses it.
    fields |= {f"ref_answer_{number}": text for number, text in enumerate((*reference, "", "")[:2], 1)}
    return Request(kind, prompt.name, judge, prompt.system_prompt, prompt.prompt_template.format(**fields), max_tokens)


# --- replies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A reply as saved: ``key`` is its request's, ``judge`` the names of the judge and the prompt."""

    content: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tstamp: float = 0.0
    temperature: float | None = TEMPERATURE  # requested; None: not set, since the judge only accepts its own
    key: str = ""
    judge: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request; ``value`` is ``None`` without a parsable reply."""

    value: float | str | None
    reply: Reply | None

    @property
    def unparsable(self) -> bool:
        return self.reply is not None and self.value is None


class Replies:
    """Every reply ever received, by request, saved on disk.

    Args:
        journal: ``None`` if there are no replies and none will be added.
        which: which rating of a reply counts.
    """

    def __init__(self, journal: Journal[Reply] | None, which: Which = "first") -> None:
        self._journal = journal
        self._which = which
        self._of: dict[str, list[Reply]] = {}
        for reply in journal.rows if journal else ():
            self._of.setdefault(reply.key, []).append(reply)

    def add(self, request: Request, reply: Reply) -> None:
        """Save a reply; on return it survives a power cut."""
        assert self._journal is not None
        reply = replace(reply, key=request.key, judge=(request.judge, request.prompt_name))
        self._journal.append(reply)
        self._of.setdefault(request.key, []).append(reply)

    def to(self, request: Request) -> list[Reply]:
        return self._of.get(request.key, [])

    def outcome(self, request: Request) -> Outcome:
        """The outcome of the first reply that can be parsed, else of the last reply, else of none."""
        replies = self.to(request)
        for reply in replies:
            if (value := parsed(request.kind, reply.content, self._which)) is not None:
                return Outcome(value, reply)
        return Outcome(None, replies[-1] if replies else None)

    def is_open(self, request: Request, ask_again: int) -> bool:
        """Whether to send the request (again): no reply can be parsed, and there are at most ``ask_again``."""
        return len(self.to(request)) <= ask_again and self.outcome(request).value is None


def open_requests(judgments: Iterable[Judgment], replies: Replies, *, ask_again: int) -> list[Request]:
    """Requests still to be sent, without duplicates."""
    wanted = {request.key: request for judgment in judgments for request in judgment.requests}
    return [request for request in wanted.values() if replies.is_open(request, ask_again)]


def estimated_tokens(requests: Sequence[Request]) -> tuple[int, int]:
    """Approximate tokens that these requests send, and that come back if the judge is as brief as GPT-4."""
    characters = sum(len(request.system) + len(request.user) for request in requests)
    return characters // CHARACTERS_PER_TOKEN, USUAL_REPLY_TOKENS * len(requests)


# --- FastChat's format ------------------------------------------------------------------------------------

_UNPARSABLE_SCORE = -1  # FastChat's convention; its show_result skips such rows
_WINNERS = {"A": ("model_1", "model_2"), "B": ("model_2", "model_1"), "tie": ("tie", "tie"), None: ("error", "error")}


@dataclass(frozen=True)
class Judged:
    """A judgment with the outcomes of its requests."""

    judgment: Judgment
    outcomes: tuple[Outcome, ...] = ()

    @property
    def score(self) -> float | None:
        """The grade, 1 to 10; ``None`` if the reply is missing or unparsable."""
        value = self.outcomes[0].value
        return value if isinstance(value, float) else None

    @property
    def winners(self) -> tuple[str, str]:
        """The winner of a comparison in each order: ``model_1``, ``model_2``, ``tie`` or ``error``."""
        first, second = (outcome.value for outcome in self.outcomes)
        return _WINNERS[first][0], _WINNERS[second][1]  # type: ignore[index]

    @property
    def winner(self) -> str | None:
        """A win only if both orders agree, else a tie; ``None`` if a reply is missing or unparsable."""
        first, second = self.winners
        if "error" in (first, second):
            return None
        return first if first == second else "tie"


def judged(judgments: Iterable[Judgment], replies: Replies) -> list[Judged]:
    """Each judgment with the outcomes of its replies."""
    return [Judged(each, tuple(map(replies.outcome, each.requests))) for each in judgments]


def fastchat_row(each: Judged) -> dict[str, Any] | None:
    """A row of FastChat's ``model_judgment`` files; ``None`` if a reply is missing."""
    judgment, requests = each.judgment, each.judgment.requests
    replies = [outcome.reply for outcome in each.outcomes if outcome.reply is not None]
    if len(replies) < len(requests):
        return None
    row: dict[str, Any] = {"question_id": judgment.question.question_id}
    judge = [requests[0].judge, requests[0].prompt_name]
    if len(requests) == 1:
        score = each.score
        row |= {
            "model": judgment.models[0],
            "judge": judge,
            "user_prompt": requests[0].user,
            "judgment": replies[0].content,
            "score": _UNPARSABLE_SCORE if score is None else int(score) if score.is_integer() else score,
        }
    else:
        row |= {
            "model_1": judgment.models[0],
            "model_2": judgment.models[1],
            "g1_winner": each.winners[0],
            "g2_winner": each.winners[1],
            "judge": judge,
            "g1_user_prompt": requests[0].user,
            "g1_judgment": replies[0].content,
            "g2_user_prompt": requests[1].user,
            "g2_judgment": replies[1].content,
        }
    return {**row, "turn": judgment.turn, "tstamp": max(reply.tstamp for reply in replies)}
