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
from steplm.mt_bench.judge import Replies, Reply, Request

Make = Callable[..., Any]

KEY = "sk-very-secret-0123456789"


def _requests(number: int) -> list[Request]:
    return [Request("single", "single-v1", "stub", "Be fair.", f"Rate number {n}.") for n in range(number)]


@pytest.fixture
def replies(tmp_path: Path) -> Iterator[Replies]:
    with Journal(tmp_path / "replies.jsonl", Reply) as journal:
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


def test_a_request_is_what_was_published_and_its_reply_is_saved(stub_judge: Make, replies: Replies) -> None:
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
def test_what_passes_is_tried_again(stub_judge: Make, replies: Replies, fault: str) -> None:
    judge = stub_judge([fault, fault])
    assert _ask(judge, replies, 2) == []
    assert len(judge.requests) == 4
    assert all(len(replies.to(request)) == 1 for request in _requests(2))


@pytest.mark.parametrize("fault", ["500", "malformed", "cut off", "page"])
def test_what_does_not_pass_is_a_failure_with_its_reason_and_the_others_go_on(
    stub_judge: Make, replies: Replies, fault: str
) -> None:
    judge = stub_judge([fault] * 3)
    (failure,) = _ask(judge, replies, 3)
    assert failure.request == _requests(1)[0]
    assert "after 3 tries" in failure.reason
    assert KEY not in failure.reason
    assert [len(replies.to(request)) for request in _requests(3)] == [0, 1, 1]


def test_a_server_that_is_down_for_good_is_left_alone(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(["503"], forever=True)
    with pytest.raises(JudgeError, match=r"5 requests in a row.*HTTP 503: told to fail; the key was \*\*\*"):
        _ask(judge, replies, 50, retries=0)
    assert len(judge.requests) <= 6


def test_retry_after_is_obeyed_by_all(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(["429 after 0.5"])
    assert _ask(judge, replies, 3) == []
    assert judge.times[1] - judge.times[0] >= 0.5
    assert len(judge.requests) == 4


def test_a_long_wait_is_told(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(["429 after 3000"])
    told: list[str] = []

    def wait(text: str) -> None:
        told.append(text)
        client.stopped.set()

    client = JudgeClient(Endpoint("stub", judge.url, KEY), wait)
    assert ask_all(client, _requests(1), replies) == []
    assert told == ["waiting 50m00s for the judge: HTTP 429: told to fail; the key was ***"]


def test_waits_double(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(["500"] * 3)
    _ask(judge, replies, retries=3, backoff_seconds=0.1)
    waits = [later - earlier for earlier, later in zip(judge.times, judge.times[1:], strict=False)]
    for wait, expected in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert wait >= 0.75 * expected


def test_a_slow_reply_is_waited_for_and_a_too_slow_one_asked_for_again(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(["slow 0.3", "slow 3"])
    assert _ask(judge, replies, 2, timeout_seconds=1.0) == []
    assert len(judge.requests) == 3


def test_a_reply_that_cannot_be_read_is_asked_for_again_so_many_times(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(reply=lambda messages: "I would rather not say.")
    assert _ask(judge, replies, 2, ask_again=2) == []
    assert len(judge.requests) == 6
    assert replies.outcome(_requests(1)[0]).unparsable
    assert _ask(judge, replies, 2, ask_again=2) == []
    assert len(judge.requests) == 6, "a second run asks no more"


def test_requests_go_side_by_side_but_no_more_than_allowed(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(seconds=0.1)
    _ask(judge, replies, 9, concurrency=3)
    assert judge.most_at_once == 3


def test_requests_a_minute_are_spaced(stub_judge: Make, replies: Replies) -> None:
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
    stub_judge: Make, replies: Replies, server: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    judge = stub_judge(**server)
    with pytest.raises(JudgeError, match=message) as caught:
        _ask(judge, replies, 20, **options)
    assert len(judge.requests) == 1
    assert judge.url in str(caught.value)
    assert "secret" not in str(caught.value)


def test_of_many_at_once_the_first_refusal_is_told(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(key="sk-another-secret-key", seconds=0.05)
    with pytest.raises(JudgeError, match="asks for a valid key"):
        _ask(judge, replies, 60, concurrency=12)
    assert len(judge.requests) <= 12


def test_a_wrong_path_is_named(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge()
    client = JudgeClient(Endpoint("stub", judge.url.removesuffix("/v1"), KEY, retries=5, backoff_seconds=0.01))
    with pytest.raises(JudgeError, match=r"HTTP 404.*usually ends in /v1"):
        ask_all(client, _requests(3), replies)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_nobody_there_is_said_at_once(replies: Replies, url: str) -> None:
    client = JudgeClient(Endpoint("stub", url, KEY, retries=6, backoff_seconds=60))
    began = time.monotonic()
    with pytest.raises(JudgeError, match=rf"^nobody answers at {url}: the connection failed .*Check --base-url"):
        client.check()
    with pytest.raises(JudgeError, match="nobody answers"):
        ask_all(client, _requests(30), replies)
    assert time.monotonic() - began < 5, "without a retry"


def test_a_server_that_was_there_and_goes_is_waited_for(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge()
    client = JudgeClient(Endpoint("stub", judge.url, KEY, retries=1, backoff_seconds=0.01))
    client.check()
    judge.__exit__(None, None, None)
    (failure,) = ask_all(client, _requests(1), replies)
    assert failure.reason.startswith("the connection failed")
    assert failure.reason.endswith("after 2 tries")


def test_the_check_asks_nothing_of_the_model(stub_judge: Make) -> None:
    judge = stub_judge()
    JudgeClient(Endpoint("stub", judge.url, KEY)).check()
    assert judge.requests == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "upstream provider is overloaded", "code": 502}}', "upstream provider is overloaded"),
        (b'{"error": "out of memory"}', "out of memory"),
        (b'{"choices": [{"index": 0, "error": {"message": "filtered"}, "message": {}}]}', "filtered"),
    ],
)
def test_an_error_that_comes_as_a_success_is_shown_in_the_judges_words(
    stub_judge: Make, replies: Replies, body: bytes, said: str
) -> None:
    judge = stub_judge(raw=body)
    (failure,) = _ask(judge, replies)
    assert failure.reason == f"the judge says: {said}, after 3 tries"


@pytest.mark.parametrize(
    "body", ['{"detail": "too long\\nby far"}', '{"message": "too long by far"}', "too long by far"]
)
def test_a_refusal_is_shown_in_the_servers_words(stub_judge: Make, replies: Replies, body: str) -> None:
    (failure,) = _ask(stub_judge(raw=body.encode(), status=422), replies)
    assert failure.reason == "HTTP 422: too long by far"


def test_half_a_character_in_a_reply_is_saved_as_a_replacement(
    stub_judge: Make, replies: Replies, tmp_path: Path
) -> None:
    assert _ask(stub_judge(reply=lambda messages: "ok \ud83d [[6]]"), replies) == []
    assert replies.to(_requests(1)[0])[0].content == "ok \N{REPLACEMENT CHARACTER} [[6]]"
    assert "\N{REPLACEMENT CHARACTER}" in (tmp_path / "replies.jsonl").read_text(encoding="utf-8")


def test_a_judge_that_wants_the_limit_under_its_new_name_gets_it(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(refuse_max_tokens=True)
    assert _ask(judge, replies, 2) == []
    assert [next(name for name in body if "max" in name) for body in judge.requests] == [
        "max_tokens",
        "max_completion_tokens",
        "max_completion_tokens",
    ]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_judge_with_a_temperature_of_its_own_is_asked_without_one_and_it_is_told_and_saved(
    stub_judge: Make, replies: Replies, tmp_path: Path, concurrency: int
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


def test_a_refusal_that_says_nothing_of_the_temperature_leaves_it(stub_judge: Make, replies: Replies) -> None:
    judge = stub_judge(["400"])
    (failure,) = _ask(judge, replies, 3)
    assert failure.reason == "HTTP 400: told to fail; the key was ***"
    assert [body.get("temperature") for body in judge.requests] == [0, 0, 0]


def test_secrets_are_neither_in_the_address_shown_nor_in_what_is_printed_of_an_endpoint() -> None:
    endpoint = Endpoint("m", "http://user:password@host:1/v1?token=abc", KEY)
    assert endpoint.shown_url == "http://host:1/v1"
    assert KEY not in repr(endpoint)
    assert endpoint.redacted(f"you sent {KEY}!") == "you sent ***!"
    assert endpoint.redacted(f"wrong key: {KEY[:9]}****{KEY[-4:]}.") == "wrong key: ***."


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://[::1/v1", {}),
        ("http://h/v1", {"api_key": "two\nlines-of-a-key"}),
        ("localhost:8000/v1", {}),
        ("", {}),
    ],
)
def test_settings_that_make_no_sense_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint("m", url, **options)
    assert "two" not in str(caught.value)
