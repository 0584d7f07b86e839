"""The judge's endpoint as it is on a bad day, over real HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the extra steplm[mtbench]")

from steplm.errors import ConfigError, JudgeError
from steplm.mt_bench.client import Endpoint, Failure, JudgeClient, ask_all
from steplm.mt_bench.journal import Journal
from steplm.mt_bench.judge import Replies, Request

KEY = "sk-very-secret-0123456789"


def _requests(number: int) -> list[Request]:
    return [Request("single", "single-v1", "stub", "Be fair.", f"Rate number {n}.") for n in range(number)]


@pytest.fixture
def replies(tmp_path: Path) -> Iterator[Replies]:
    with Journal(tmp_path / "replies.jsonl") as journal:
        yield Replies(journal)


def _ask(judge: Any, replies: Replies, number: int = 1, *, ask_again: int = 2, **options: Any) -> list[Failure]:
    settings = {
        "api_key": KEY,
        "backoff_seconds": 0.01,
        "concurrency": 1,
        "retries": 2,
        "timeout_seconds": 5.0,
        **options,
    }
    return ask_all(
        JudgeClient(Endpoint("stub", judge.url, **settings)), _requests(number), replies, ask_again=ask_again
    )


def test_a_request_is_what_was_published_and_its_reply_is_saved(
    stub_judge: Callable[..., Any], replies: Replies
) -> None:
    judge = stub_judge(key=KEY)
    assert _ask(judge, replies) == []
    (sent,) = judge.requests
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("stub", 0, 2048)
    assert sent["messages"] == [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "Rate number 0."},
    ]
    (reply,) = replies.to(_requests(1)[0])
    assert "Rating: [[" in reply.content
    assert reply.prompt_tokens is not None
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "malformed", "cut off", "no choices", "page"])
def test_what_passes_is_tried_again(stub_judge: Callable[..., Any], replies: Replies, fault: str) -> None:
    judge = stub_judge([fault, fault])
    assert _ask(judge, replies, 2) == []
    assert len(judge.requests) == 4
    assert all(len(replies.to(request)) == 1 for request in _requests(2))


@pytest.mark.parametrize("fault", ["500", "malformed", "cut off", "page"])
def test_what_does_not_pass_is_a_failure_with_its_reason_and_the_others_go_on(
    stub_judge: Callable[..., Any], replies: Replies, fault: str
) -> None:
    judge = stub_judge([fault] * 3)
    (failure,) = _ask(judge, replies, 3)
    assert failure.request == _requests(1)[0]
    assert "after 3 tries" in failure.reason
    assert KEY not in failure.reason
    assert [len(replies.to(request)) for request in _requests(3)] == [0, 1, 1]


def test_a_server_that_is_down_for_good_is_left_alone(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge(["503"], forever=True)
    with pytest.raises(JudgeError, match=r"5 requests in a row.*HTTP 503: told to fail; the key was \*\*\*"):
        _ask(judge, replies, 50, retries=0)
    assert len(judge.requests) <= 6


def test_retry_after_is_obeyed_by_all(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge(["429 after 0.5"])
    assert _ask(judge, replies, 3) == []
    assert judge.times[1] - judge.times[0] >= 0.5
    assert len(judge.requests) == 4


def test_a_long_wait_is_told(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge(["429 after 3000"])
    told: list[str] = []

    def wait(text: str) -> None:
        told.append(text)
        client.stopped.set()

    client = JudgeClient(Endpoint("stub", judge.url, KEY), wait)
    assert ask_all(client, _requests(1), replies) == []
    assert told == ["the judge is waited for, 50m00s: HTTP 429: told to fail; the key was ***"]


def test_waits_double(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge(["500"] * 3)
    _ask(judge, replies, retries=3, backoff_seconds=0.1)
    waits = [later - earlier for earlier, later in zip(judge.times, judge.times[1:], strict=False)]
    for wait, expected in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert wait >= 0.75 * expected


def test_a_slow_reply_is_waited_for_and_a_too_slow_one_asked_for_again(
    stub_judge: Callable[..., Any], replies: Replies
) -> None:
    judge = stub_judge(["slow 0.3", "slow 3"])
    assert _ask(judge, replies, 2, timeout_seconds=1.0) == []
    assert len(judge.requests) == 3


def test_a_reply_that_cannot_be_read_is_asked_for_again_so_many_times(
    stub_judge: Callable[..., Any], replies: Replies
) -> None:
    judge = stub_judge(reply=lambda messages: "I would rather not say.")
    assert _ask(judge, replies, 2, ask_again=2) == []
    assert len(judge.requests) == 6
    assert replies.outcome(_requests(1)[0]).unparsable
    assert _ask(judge, replies, 2, ask_again=2) == []
    assert len(judge.requests) == 6, "a second run asks no more"


def test_requests_go_side_by_side_but_no_more_than_allowed(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge(seconds=0.1)
    _ask(judge, replies, 9, concurrency=3)
    assert judge.most_at_once == 3


def test_requests_a_minute_are_spaced(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge()
    began = time.monotonic()
    _ask(judge, replies, 5, concurrency=5, requests_per_minute=600)
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        (
            {"key": "sk-another-secret-key"},
            {},
            "asks for a valid key .HTTP 401.*OPENAI_API_KEY: the one there is refused",
        ),
        ({"key": "sk-another-secret-key"}, {"api_key": None}, "OPENAI_API_KEY: there is none.*--api-key-env"),
        ({"model": "gpt-4"}, {}, "knows no model 'stub'.*the model stub does not exist.*--judge-model"),
        ({"faults": ["403"]}, {}, "HTTP 403"),
        ({"faults": ["429 insufficient_quota"]}, {}, "no credit left"),
    ],
)
def test_what_no_retry_can_mend_stops_at_once(
    stub_judge: Callable[..., Any], replies: Replies, server: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    judge = stub_judge(**server)
    with pytest.raises(JudgeError, match=message) as caught:
        _ask(judge, replies, 20, **options)
    assert len(judge.requests) == 1
    assert judge.url in str(caught.value)
    assert "secret" not in str(caught.value)


def test_of_many_at_once_the_first_refusal_is_told(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge(key="sk-another-secret-key", seconds=0.05)
    with pytest.raises(JudgeError, match="asks for a valid key"):
        _ask(judge, replies, 60, concurrency=12)
    assert len(judge.requests) <= 12


def test_a_wrong_path_is_named(stub_judge: Callable[..., Any], replies: Replies) -> None:
    judge = stub_judge()
    client = JudgeClient(Endpoint("stub", judge.url.removesuffix("/v1"), KEY, retries=5, backoff_seconds=0.01))
    with pytest.raises(JudgeError, match=r"HTTP 404.*usually ends in /v1"):
        ask_all(client, _requests(3), replies)


def test_nobody_there_is_said_after_the_retries(replies: Replies) -> None:
    client = JudgeClient(Endpoint("stub", "http://127.0.0.1:9/v1", KEY, retries=1, backoff_seconds=0.01))
    with pytest.raises(JudgeError, match=r"http://127.0.0.1:9/v1 cannot be reached after 2 tries"):
        ask_all(client, _requests(30), replies)


def test_a_judge_that_wants_the_limit_under_its_new_name_gets_it(
    stub_judge: Callable[..., Any], replies: Replies
) -> None:
    judge = stub_judge(refuse_max_tokens=True)
    assert _ask(judge, replies, 2) == []
    assert [next(name for name in body if "max" in name) for body in judge.requests] == [
        "max_tokens",
        "max_completion_tokens",
        "max_completion_tokens",
    ]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_judge_with_a_temperature_of_its_own_is_asked_without_one_and_it_is_told_and_saved(
    stub_judge: Callable[..., Any], replies: Replies, tmp_path: Path, concurrency: int
) -> None:
    judge = stub_judge(refuse_temperature=True, refuse_max_tokens=True, seconds=0.05)
    said: list[str] = []
    endpoint = Endpoint("stub", judge.url, retries=0, concurrency=concurrency)  # a refusal of options is no failed try
    assert ask_all(JudgeClient(endpoint, said.append), _requests(8), replies) == []
    accepted = [body for body in judge.requests if not {"temperature", "max_tokens"} & body.keys()]
    assert len(accepted) == 8
    assert {body["max_completion_tokens"] for body in accepted} == {2048}
    assert len(judge.requests) <= 8 + 2 * concurrency, "what it refuses is remembered"
    assert said == ["note: stub refuses temperature 0 and is asked at its own: asked again, it may give other scores"]
    assert {replies.to(request)[0].temperature for request in _requests(8)} == {None}
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert {row["temperature"] for row in rows} == {None}
    assert replies.to(Request("single", "single-v1", "stub", "", "")) == []


def test_a_refusal_that_says_nothing_of_the_temperature_leaves_it(
    stub_judge: Callable[..., Any], replies: Replies
) -> None:
    judge = stub_judge(["400"])
    (failure,) = _ask(judge, replies, 3)
    assert failure.reason == "HTTP 400: told to fail; the key was ***"
    assert [body.get("temperature") for body in judge.requests] == [0, 0, 0]


def test_secrets_are_neither_in_the_address_shown_nor_in_what_is_printed_of_an_endpoint() -> None:
    endpoint = Endpoint("m", "http://user:password@host:1/v1?token=abc", KEY)
    assert endpoint.shown_url == "http://host:1/v1"
    assert KEY not in repr(endpoint)
    assert endpoint.redacted(f"you sent {KEY}!") == "you sent ***!"


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://[::1/v1", {}),
        ("http://h/v1", {"api_key": "two\nlines-of-a-key"}),
        ("localhost:8000/v1", {}),
        ("", {}),
        ("http://h/v1", {"concurrency": 0}),
        ("http://h/v1", {"requests_per_minute": 0}),
    ],
)
def test_settings_that_make_no_sense_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint("m", url, **options)
    assert "two" not in str(caught.value)
