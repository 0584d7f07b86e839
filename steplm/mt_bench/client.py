"""Asking the judge: an OpenAI-compatible endpoint that may be slow, busy, broken, or not there.

The key is read from the environment by whoever calls, held in memory, and cut out of every text that leaves here.
"""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from steplm.errors import ConfigError, JudgeError
from steplm.mt_bench.judge import TEMPERATURE, Replies, Reply, Request
from steplm.units import format_seconds, reason

if TYPE_CHECKING:
    from openai import APIStatusError

LONG_WAIT_SECONDS = 10.0  # is told of
LONGEST_WAIT_SECONDS = 60.0  # of our own back-off; a server's Retry-After may ask for more
LONGEST_RETRY_AFTER_SECONDS = 3600.0
MOST_FAILURES_IN_A_ROW = 5  # then the server is taken for down
_PASSING = (408, 409, 425, 429)  # and every 5xx
_SHORTEST_SECRET = 8  # characters; a local server's key may be an "x", which stands in many replies
_PLACEHOLDER_KEY = "none"


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is, and how patiently it is asked. ``api_key=None`` suits a local server."""

    model: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str = "OPENAI_API_KEY"  # named in messages
    timeout_seconds: float = 120.0
    retries: int = 6  # of one request, after the first try
    backoff_seconds: float = 1.0  # before the first retry; doubled before each further one
    concurrency: int = 4
    requests_per_minute: float | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            is_url = False
        if not is_url:
            raise ConfigError(
                f"the base URL {self.shown_url!r} is no URL. Write it as http://localhost:8000/v1.", url=self.shown_url
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError(
                f"the key in {self.api_key_env} has characters that no key has (a line break, perhaps). Export it anew."
            )
        least = {"timeout_seconds": 0.001, "retries": 0, "backoff_seconds": 0, "concurrency": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least {lowest:g}")
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ConfigError(f"requests_per_minute is {self.requests_per_minute:g}, but must be above 0")

    @property
    def shown_url(self) -> str:
        """Without a password or a query, which can hold secrets."""
        try:
            parts = urlsplit(self.base_url)
            return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        except ValueError:
            return "?"

    def redacted(self, text: str) -> str:
        """The text without the key, should a server have sent it back."""
        key = self.api_key or ""
        return text.replace(key, "***") if len(key) >= _SHORTEST_SECRET else text


@dataclass(frozen=True)
class Failure:
    """A request that got no reply, though others may."""

    request: Request
    reason: str


class _Passing(Exception):
    """Worth another try."""

    def __init__(self, reason: str, *, retry_after: float | None = None, reached: bool = True) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.reached = reached  # the server, at all


class _Refused(Exception):
    """This request will never get a reply."""


class _Stopped(Exception):
    """Nothing more is to be asked."""


class JudgeClient:
    """One connection pool to the judge; threads may ask together.

    Args:
        say: told where a wait is long, and where the judge is asked otherwise than as published.

    Raises:
        ConfigError: the ``openai`` library is not installed.
    """

    def __init__(self, endpoint: Endpoint, say: Callable[[str], None] = lambda text: None) -> None:
        self.endpoint = endpoint
        self._say = say
        self._openai = _library()
        self._client = self._openai.OpenAI(
            api_key=endpoint.api_key or _PLACEHOLDER_KEY,
            base_url=endpoint.base_url,
            timeout=endpoint.timeout_seconds,
            max_retries=0,  # ours can be interrupted, slow all threads down together, and retry torn bodies
        )
        self._pace = _Pace(endpoint.requests_per_minute)
        self._options: tuple[str, ...] = ("temperature", "max_tokens")
        self._lock = threading.Lock()
        self._reached = False
        self.stopped = threading.Event()

    def ask(self, request: Request) -> Reply:
        """The judge's reply, after as many tries as the endpoint allows.

        Raises:
            JudgeError: no request can succeed: a refused key, a wrong URL or model, nobody there.
            _Refused: this one cannot.
            _Stopped: ``stopped`` was set.
        """
        endpoint = self.endpoint
        last = _Passing("")
        for attempt in range(endpoint.retries + 1):
            self._pace.wait(self.stopped)
            if self.stopped.is_set():
                raise _Stopped
            try:
                reply = self._try(request)
            except _Passing as passing:
                last = passing
            else:
                self._reached = True
                return reply
            self._reached |= last.reached
            if attempt == endpoint.retries:
                break
            if last.retry_after is not None:  # holds for all threads: the server has had enough of us
                wait = min(last.retry_after, LONGEST_RETRY_AFTER_SECONDS)
                self._pace.pause(wait)
            else:
                wait = min(endpoint.backoff_seconds * 2**attempt, LONGEST_WAIT_SECONDS)
                wait *= random.uniform(0.75, 1.25)  # so that threads do not come back as one
            if wait >= LONG_WAIT_SECONDS:
                self._say(f"the judge is waited for, {format_seconds(wait)}: {last}")
            if last.retry_after is None:
                self.stopped.wait(wait)
        tries = f"{endpoint.retries + 1} tries" if endpoint.retries else "1 try"
        if not self._reached:
            raise JudgeError(
                f"the judge at {endpoint.shown_url} cannot be reached after {tries}: {last}. Check --base-url and "
                "the network, or start the server.",
                url=endpoint.shown_url,
            )
        raise _Refused(f"{last}, after {tries}")

    def _try(self, request: Request) -> Reply:
        """One try, in the options that this judge takes: of its refusals it is learned which."""
        options = known = self._options
        while True:
            try:
                reply = self._send(request, options)
            except self._openai.APIStatusError as error:
                other = _accepted_instead(error, options)
                if other is None:
                    raise self._of_status(error) from None
                options = other
                self._pace.wait(self.stopped)
                if self.stopped.is_set():
                    raise _Stopped from None
            else:
                if options is not known:
                    self._remember(options)
                return reply

    def _remember(self, options: tuple[str, ...]) -> None:
        with self._lock:
            before, self._options = self._options, options
        if "temperature" in before and "temperature" not in options:
            self._say(
                f"note: {self.endpoint.model} refuses temperature {TEMPERATURE} and is asked at its own: asked again, "
                "it may give other scores"
            )

    def _send(self, request: Request, options: tuple[str, ...]) -> Reply:
        openai = self._openai
        limit = request.max_tokens
        values = {"temperature": TEMPERATURE, "max_tokens": limit, "max_completion_tokens": limit}
        try:
            completion = self._client.chat.completions.create(
                model=request.judge,
                messages=[
                    {"role": "system", "content": request.system},
                    {"role": "user", "content": request.user},
                ],
                **{name: values[name] for name in options},
            )
        except openai.APIStatusError:  # of the kind below too, and for whoever sent it to understand
            raise
        except openai.APIConnectionError as error:  # timeouts too
            cause = error.__cause__ or error
            said = f"the connection failed ({self.endpoint.redacted(reason(cause))})"
            if isinstance(error, openai.APITimeoutError):
                said = f"no reply within {self.endpoint.timeout_seconds:g} s"
            # ConnectError and ConnectTimeout, and not a connection that broke: somebody was there.
            raise _Passing(said, reached=not type(cause).__name__.startswith("Connect")) from None
        except (openai.APIError, ValueError, TypeError, AttributeError) as error:  # a body that is no JSON
            raise _Passing(f"a malformed reply ({self.endpoint.redacted(reason(error))})") from None
        return self._reply(completion, TEMPERATURE if "temperature" in options else None)

    def _reply(self, completion: Any, temperature: int | None) -> Reply:
        try:
            choice = completion.choices[0]
            content = choice.message.content
            if not isinstance(content, str | None):
                raise TypeError
        except (AttributeError, IndexError, TypeError, KeyError):
            shown = self.endpoint.redacted(str(completion))[:120]
            raise _Passing(f"a reply that is no chat completion: {shown!r}") from None
        usage = completion.usage
        return Reply(
            self.endpoint.redacted(content or ""),  # nothing: a refusal or a filter, unparsable
            getattr(choice, "finish_reason", None),
            _whole(getattr(usage, "prompt_tokens", None)),
            _whole(getattr(usage, "completion_tokens", None)),
            time.time(),
            temperature,
        )

    def _of_status(self, error: APIStatusError) -> Exception:
        endpoint, status = self.endpoint, error.status_code
        said = endpoint.redacted(_message(error))
        url = endpoint.shown_url
        if status in (401, 403):  # what the server says may quote the key in part
            held = "there is none" if endpoint.api_key is None else "the one there is refused"
            return JudgeError(
                f"the judge at {url} asks for a valid key (HTTP {status}). It is read from the environment variable "
                f"{endpoint.api_key_env}: {held}. Export the right one, or name another variable with --api-key-env.",
                url=url,
                status=status,
            )
        if status == 404 or error.code == "model_not_found":
            return JudgeError(
                f"the judge at {url} knows no model {endpoint.model!r}, or the URL is wrong (HTTP {status}: {said}). "
                "Check --judge-model, and --base-url, which usually ends in /v1.",
                url=url,
                status=status,
            )
        if error.code == "insufficient_quota":
            return JudgeError(
                f"the account at {url} has no credit left (HTTP {status}: {said}). What was judged is saved: top it "
                "up and start the same command again.",
                url=url,
                status=status,
            )
        if status in _PASSING or status >= 500:
            return _Passing(f"HTTP {status}: {said}", retry_after=_retry_after(error.response.headers))
        return _Refused(f"HTTP {status}: {said}")


def ask_all(
    client: JudgeClient,
    requests: Sequence[Request],
    replies: Replies,
    *,
    ask_again: int = 2,
    on_done: Callable[[], None] = lambda: None,
) -> list[Failure]:
    """Ask every request until a reply can be read, or ``1 + ask_again`` could not; each reply is saved as it comes.

    Stopped in the middle it lets the requests under way end, and saves them too.

    Args:
        on_done: called once a request, in the calling thread.

    Returns: the requests without any reply, with the reason.

    Raises:
        JudgeError: no request can succeed, or ``MOST_FAILURES_IN_A_ROW`` did not.
    """

    def work(request: Request) -> Failure | None:
        while not client.stopped.is_set() and len(replies.to(request)) <= ask_again:
            try:
                replies.add(request, client.ask(request))
            except _Stopped:
                return None
            except _Refused as refused:
                return Failure(request, str(refused))
            except JudgeError:
                client.stopped.set()  # at once, before another thread takes the next request
                raise
            if replies.outcome(request).value is not None:
                break
        return None

    failures: list[Failure] = []
    in_a_row = 0
    with ThreadPoolExecutor(client.endpoint.concurrency, thread_name_prefix="judge") as pool:
        futures: list[Future[Failure | None]] = [pool.submit(work, request) for request in requests]
        try:
            for future in as_completed(futures):
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
    """When the next request may leave: evenly spaced, and not before a pause has ended."""

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

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _accepted_instead(error: APIStatusError, options: tuple[str, ...]) -> tuple[str, ...] | None:
    """Options that the judge may take after it has refused these; ``None`` where it was not for their sake."""
    said = _message(error)
    if error.status_code != 400:
        return None
    if "max_tokens" in options and "max_completion_tokens" in said:  # as newer models call the same limit
        return tuple("max_completion_tokens" if name == "max_tokens" else name for name in options)
    is_temperature = error.param == "temperature" or ("temperature" in said and "support" in said.lower())
    if "temperature" in options and is_temperature:  # reasoning models have theirs
        return tuple(name for name in options if name != "temperature")
    return None


def _library() -> ModuleType:
    try:
        import openai
    except ImportError:
        raise ConfigError("MT-Bench's judge needs the openai library: pip install '.[mtbench]'") from None
    return openai


def _message(error: APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        text = inner.get("message") if isinstance(inner, dict) else inner
        if isinstance(text, str) and text.strip():
            return text.strip()[:300]
    return str(body or error.message).strip()[:300]


def _retry_after(headers: Any) -> float | None:
    """Seconds from ``Retry-After``, which holds a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
