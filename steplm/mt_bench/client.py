"""A client for the judge: an OpenAI-compatible endpoint that may be slow, busy, broken or down.

It does not use the retries of the ``openai`` client: here a pause that the server asks for applies to all threads and
may last an hour, malformed replies are retried too, and Ctrl-C ends a wait.

The caller reads the API key from the environment. The key is kept in memory and removed from all text that leaves here.
"""

from __future__ import annotations

import email.utils
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from steplm.errors import ConfigError, JudgeError
from steplm.files import as_unicode
from steplm.mt_bench.judge import TEMPERATURE, Replies, Reply, Request
from steplm.units import format_seconds, reason

if TYPE_CHECKING:
    from openai import APIConnectionError, APIStatusError

CONNECT_SECONDS = 5.0
LONG_WAIT_SECONDS = 10.0  # waits at least this long are announced
LONGEST_WAIT_SECONDS = 60.0  # of our own backoff; a server's Retry-After may ask for more
LONGEST_RETRY_AFTER_SECONDS = 3600.0
MOST_FAILURES_IN_A_ROW = 5  # then the server is considered down
_RETRIED = (408, 409, 425, 429)  # and every 5xx
_SHORTEST_SECRET = 8  # characters; a local server's key may be just "x", which many replies contain


@dataclass(frozen=True)
class Endpoint:
    """Address of the judge, with timeouts, retries and rate limit; ``api_key=None`` suits a local server."""

    model: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str = "OPENAI_API_KEY"  # named in messages
    timeout_seconds: float = 120.0
    retries: int = 6  # per request, after the first try
    backoff_seconds: float = 1.0  # before the first retry; doubled before each further one
    concurrency: int = 4
    requests_per_minute: float | None = None

    def __post_init__(self) -> None:
        if not self.shown_url.startswith(("http://", "https://")) or not urlsplit(self.base_url).hostname:
            raise ConfigError(
                f"the base URL {self.shown_url!r} is not a valid URL. Write it as http://localhost:8000/v1.",
                url=self.shown_url,
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError(
                f"the key in {self.api_key_env} contains a character that no key has, such as a line break. Export it "
                "again."
            )

    @property
    def shown_url(self) -> str:
        """The URL without password and query, which can contain secrets."""
        try:
            parts = urlsplit(self.base_url)
            return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        except ValueError:
            return "?"

    def redacted(self, text: str) -> str:
        """The text without the key, in case a server echoed it, whole or only its beginning or end."""
        key = self.api_key or ""
        if len(key) < _SHORTEST_SECRET:
            return text
        ends = "|".join(map(re.escape, (key[:_SHORTEST_SECRET], key[-_SHORTEST_SECRET:])))
        return re.sub(rf"[\w*.-]*(?:{ends})[\w*-]*", "***", text.replace(key, "***"))


@dataclass(frozen=True)
class Failure:
    """A request that got no reply; others may still succeed."""

    request: Request
    reason: str


class _Retryable(Exception):
    """This attempt failed; another may succeed."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _Refused(Exception):
    """This request will never get a reply."""


class _Stopped(Exception):
    """The client was stopped and sends no further requests."""


class JudgeClient:
    """A connection pool to the judge, shared by threads.

    Args:
        say: called with a note about every long wait, and when the judge is not asked at the published temperature.

    Raises:
        ConfigError: the ``openai`` library is not installed.
    """

    def __init__(self, endpoint: Endpoint, say: Callable[[str], None] = lambda text: None) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError("MT-Bench's judge needs the openai library: pip install '.[mtbench]'") from None
        self.endpoint = endpoint
        self._say = say
        self._openai = openai
        self._client = openai.OpenAI(
            api_key=endpoint.api_key or "none",
            base_url=endpoint.base_url,
            timeout=openai.Timeout(endpoint.timeout_seconds, connect=min(CONNECT_SECONDS, endpoint.timeout_seconds)),
            max_retries=0,
        )
        self._pace = _Pace(endpoint.requests_per_minute)
        self._options: tuple[str, ...] = ("temperature", "max_tokens")
        self._lock = threading.Lock()
        self._was_reached = False
        self.stopped = threading.Event()

    def check(self) -> None:
        """Raise ``JudgeError`` if nothing answers at the address; any answer, even an error, will do."""
        try:
            self._client.models.list()
        except self._openai.APIConnectionError as error:
            if isinstance(found := self._connection_error(error), JudgeError):
                raise found from None
        except (self._openai.OpenAIError, ValueError, TypeError, AttributeError):
            pass
        self._was_reached = True

    def ask(self, request: Request) -> Reply:
        """Return the judge's reply, after as many tries as the endpoint allows.

        Raises:
            JudgeError: no request can succeed: the key is rejected, the URL or model is wrong, the account has no
                credit left, or the server is down.
            _Refused: this request cannot succeed.
            _Stopped: ``stopped`` was set.
        """
        endpoint = self.endpoint
        for attempt in range(endpoint.retries + 1):
            try:
                reply = self._send(request)
            except _Retryable as error:
                last = error
            else:
                self._was_reached = True
                return reply
            if attempt < endpoint.retries:
                self._wait(last, attempt)
        raise _Refused(f"{last}, after {endpoint.retries + 1} {'tries' if endpoint.retries else 'try'}")

    def _wait(self, error: _Retryable, attempt: int) -> None:
        if error.retry_after is not None:  # applies to all threads: the server throttles us
            wait = min(error.retry_after, LONGEST_RETRY_AFTER_SECONDS)
            self._pace.pause(wait)
        else:
            wait = min(self.endpoint.backoff_seconds * 2**attempt, LONGEST_WAIT_SECONDS)
            wait *= random.uniform(0.75, 1.25)  # so that threads do not retry at the same instant
        if wait >= LONG_WAIT_SECONDS:
            self._say(f"waiting {format_seconds(wait)} for the judge: {error}")
        if error.retry_after is None:
            self.stopped.wait(wait)

    def _send(self, request: Request) -> Reply:
        """One try, with the options that this judge accepts, which are learned from its rejections."""
        openai = self._openai
        values = {"temperature": TEMPERATURE, "max_tokens": request.max_tokens}
        values["max_completion_tokens"] = request.max_tokens
        messages: Any = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        while True:
            self._pace.wait(self.stopped)
            options = self._options
            chosen: Any = {name: values[name] for name in options}
            try:
                completion = self._client.chat.completions.create(model=request.judge, messages=messages, **chosen)
                return self._reply(completion, TEMPERATURE if "temperature" in options else None)
            except openai.APIStatusError as error:  # must precede its base class below
                if not self._learned(error, options):
                    raise self._status_error(error) from None
            except openai.APIConnectionError as error:  # including timeouts
                raise self._connection_error(error) from None
            except (openai.OpenAIError, ValueError, TypeError) as error:
                raise _Retryable(f"a malformed reply ({self.endpoint.redacted(reason(error))})") from None

    def _learned(self, error: APIStatusError, options: tuple[str, ...]) -> bool:
        """Whether the judge rejected an option; if so, change the options, so that it may accept the request."""
        said = _text_of(error.body or error.message)
        if error.status_code != 400:
            return False
        is_temperature = error.param == "temperature" or ("temperature" in said and "support" in said.lower())
        if "max_tokens" in options and "max_completion_tokens" in said:  # newer models' name for the same limit
            other = tuple("max_completion_tokens" if name == "max_tokens" else name for name in options)
        elif "temperature" in options and is_temperature:  # reasoning models only accept their own
            other = tuple(name for name in options if name != "temperature")
        else:
            return False
        with self._lock:
            is_news = "temperature" in self._options and "temperature" not in other
            if self._options == options:
                self._options = other
        if is_news:
            self._say(
                f"note: {self.endpoint.model} refuses temperature {TEMPERATURE} and is asked at its own: asked again, "
                "it may give other scores"
            )
        return True

    def _reply(self, completion: Any, temperature: int | None) -> Reply:
        try:
            choice = (completion.choices or [None])[0]
            error = getattr(choice, "error", None) or getattr(completion, "error", None)
            content = None if error else choice.message.content
            if not isinstance(content, str | None):
                raise TypeError
        except (AttributeError, TypeError):
            shown = self.endpoint.redacted(str(completion))[:120]
            raise _Retryable(f"a reply that is not a chat completion: {shown!r}") from None
        if error:  # some gateways send their errors with HTTP 200
            raise _Retryable(f"the judge says: {self.endpoint.redacted(_text_of(error))}")
        used = [getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        sent, received = (number if type(number) is int else None for number in used)
        return Reply(
            as_unicode(self.endpoint.redacted(content or "")),  # empty after a refusal or a filter, so unparsable
            getattr(choice, "finish_reason", None),
            sent,
            received,
            time.time(),
            temperature,
        )

    def _connection_error(self, error: APIConnectionError) -> Exception:
        """A ``JudgeError`` if the server was never reached: only one that was reached before may recover."""
        cause = error.__cause__ or error
        said = f"the connection failed ({self.endpoint.redacted(reason(cause))})"
        # ConnectError and ConnectTimeout, but not a broken connection, which shows that a server is there.
        if type(cause).__name__.startswith("Connect") and not self._was_reached:
            url = self.endpoint.shown_url
            return JudgeError(
                f"nobody answers at {url}: {said}. Check --base-url and the network, or start the server.", url=url
            )
        if isinstance(error, self._openai.APITimeoutError):
            said = f"no reply within {self.endpoint.timeout_seconds:g} s"
        return _Retryable(said)

    def _status_error(self, error: APIStatusError) -> Exception:
        endpoint, status = self.endpoint, error.status_code
        said = f"HTTP {status}: {endpoint.redacted(_text_of(error.body or error.message))}"
        url = endpoint.shown_url
        if status in (401, 403):
            held = "there is none" if endpoint.api_key is None else "the one there is refused"
            problem = (
                f"asks for a valid key ({said}). It is read from the environment variable {endpoint.api_key_env}: "
                f"{held}. Export the right one, or name another variable with --api-key-env."
            )
        elif status == 404 or error.code == "model_not_found":
            problem = (
                f"knows no model {endpoint.model!r}, or the URL is wrong ({said}). "
                "Check --judge-model, and --base-url, which usually ends in /v1."
            )
        elif error.code == "insufficient_quota":
            problem = (
                f"says that the account has no credit left ({said}). What was judged is saved: top it up and start "
                "the same command again."
            )
        elif status in _RETRIED or status >= 500:
            return _Retryable(said, _retry_after(error.response.headers.get("retry-after")))
        else:
            return _Refused(said)
        return JudgeError(f"the judge at {url} {problem}", url=url, status=status)


def ask_all(
    client: JudgeClient,
    requests: Sequence[Request],
    replies: Replies,
    *,
    ask_again: int = 2,
    on_done: Callable[[], None] = lambda: None,
) -> list[Failure]:
    """Send every request until a reply can be parsed, or ``1 + ask_again`` could not; save each reply as it arrives.

    When interrupted, it lets requests in flight finish and saves their replies too.

    Args:
        on_done: called once per request, in the calling thread.

    Returns:
        The requests that got no reply, with the reason.

    Raises:
        JudgeError: no request can succeed, or ``MOST_FAILURES_IN_A_ROW`` failed in a row.
    """

    def work(request: Request) -> Failure | None:
        try:
            while replies.is_open(request, ask_again):
                replies.add(request, client.ask(request))
        except _Refused as refused:
            return Failure(request, str(refused))
        except _Stopped:
            pass
        except BaseException:
            client.stopped.set()  # at once, before another thread takes the next request
            raise
        return None

    failures: list[Failure] = []
    in_a_row = 0
    with ThreadPoolExecutor(client.endpoint.concurrency, thread_name_prefix="judge") as pool:
        try:
            for future in as_completed([pool.submit(work, request) for request in requests]):
                failure = future.result()
                on_done()
                in_a_row = 0 if failure is None else in_a_row + 1
                if failure is not None:
                    failures.append(failure)
                    if in_a_row == MOST_FAILURES_IN_A_ROW:
                        raise JudgeError(
                            f"the judge at {client.endpoint.shown_url} failed on {in_a_row} requests in a row, the "
                            f"last time with: {failure.reason}. What was judged is saved: start the same command "
                            "again to go on.",
                            url=client.endpoint.shown_url,
                        )
        except BaseException:
            client.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


class _Pace:
    """Decides when the next request may be sent: evenly spaced, and not before a pause has ended."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, stopped: threading.Event) -> None:
        with self._lock:
            mine = max(self._next, time.monotonic())
            self._next = mine + self._interval
        while not stopped.is_set() and (left := mine - time.monotonic()) > 0:
            stopped.wait(left)
        if stopped.is_set():
            raise _Stopped

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _text_of(body: Any) -> str:
    """The message in ``{"error": {"message": …}}``, or in what some servers send instead, as one line."""
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    return as_unicode(" ".join(str(body).split()))[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds from ``Retry-After``, which is a number or a date."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None
