"""A judge for tests: an OpenAI-compatible server on loopback, with verdicts that follow from the text alone.

In a test: ``with StubJudge() as judge: …judge.url…``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]
_SIDE = re.compile(r"Assistant ([AB])'s")


def number_of(text: str) -> int:
    """0 to 9, from a hash."""
    return hashlib.sha256(text.encode()).digest()[0] % 10


def usual_reply(messages: Messages) -> str:
    """A rating by the whole prompt, or a verdict that does not depend on the order of the two answers."""
    prompt = messages[-1]["content"]
    if "[[A]]" not in "".join(message["content"] for message in messages):
        return f"A rating follows. Rating: [[{1 + number_of(prompt)}]]"
    parts = _SIDE.split(prompt)
    first = dict(reversed(list(zip(parts[1::2], parts[2::2], strict=True))))  # what follows the first mark of each
    a, b = (number_of(re.sub("Assistant [AB]", "Assistant", first.get(side, ""))) for side in "AB")
    return f"Compared. [[{'A' if a > b else 'B' if b > a else 'C'}]]"


class StubJudge:
    """Serves ``POST /v1/chat/completions`` and writes down every request.

    Args:
        faults: what goes wrong, one for each of the first requests in the order of arrival: ``"500"`` and other
            statuses, ``"429 after 0.2"`` (seconds, in Retry-After), ``"slow 0.3"`` (then a reply), ``"malformed"``,
            ``"cut off"``, ``"no choices"``, ``"page"`` (HTML), or ``""`` for nothing. The last one stays where
            ``forever`` is set.
        key: the only key that is let in; default: any.
        model: the only model there is; default: any.
        reply: what is said to the messages; default: ``usual_reply``.
        seconds: that each reply takes.
        refuse_max_tokens: a judge of the kind that calls it ``max_completion_tokens``.
        raw: sent with ``status`` to every request, whatever it is.
        refuse_temperature: one that has a temperature of its own, as models have that reason.
    """

    def __init__(
        self,
        faults: Sequence[str] = (),
        *,
        forever: bool = False,
        key: str | None = None,
        model: str | None = None,
        reply: Callable[[Messages], str] = usual_reply,
        seconds: float = 0.0,
        refuse_max_tokens: bool = False,
        refuse_temperature: bool = False,
        raw: bytes | None = None,
        status: int = 200,
    ) -> None:
        self.faults, self.forever = list(faults), forever
        self.key, self.model, self.reply, self.seconds = key, model, reply, seconds
        self.refuse_max_tokens, self.refuse_temperature = refuse_max_tokens, refuse_temperature
        self.raw, self.status = raw, status
        self.requests: list[dict[str, Any]] = []  # bodies, in the order of arrival
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.requests]

    def __enter__(self) -> StubJudge:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fault(self) -> str:
        number = len(self.requests) - 1
        if number < len(self.faults):
            return self.faults[number]
        return self.faults[-1] if self.forever and self.faults else ""

    def _handler(stub: StubJudge) -> type[BaseHTTPRequestHandler]:  # noqa: N805  the handler has a self of its own
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    return self._error(404, "no such path")
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                with stub._lock:
                    stub.requests.append(body)
                    stub.times.append(time.monotonic())
                    stub.keys.add(key)
                    stub._at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub._at_once)
                    fault = stub._fault()
                try:
                    time.sleep(stub.seconds)
                    self._answer(body, key, fault)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the other side was killed, or lost its patience
                finally:
                    with stub._lock:
                        stub._at_once -= 1
                return None

            def _answer(self, body: dict[str, Any], key: str, fault: str) -> None:
                if stub.key not in (None, key):
                    return self._error(401, f"the key {key} is wrong", code="invalid_api_key")
                if stub.model not in (None, body["model"]):
                    return self._error(404, f"the model {body['model']} does not exist", code="model_not_found")
                if stub.refuse_max_tokens and "max_tokens" in body:
                    return self._error(400, "Unsupported 'max_tokens'. Use 'max_completion_tokens' instead.")
                if stub.refuse_temperature and "temperature" in body:
                    return self._error(400, "Unsupported value: 'temperature' does not support 0 with this model.")
                if stub.raw is not None:
                    return self._send(stub.status, stub.raw)
                words = fault.split()
                if words and words[0].isdigit():
                    after = {"Retry-After": words[2]} if len(words) > 2 else {}
                    code = words[1] if len(words) == 2 else None
                    return self._error(int(words[0]), f"told to fail; the key was {key}", code=code, headers=after)
                if words and words[0] == "slow":
                    time.sleep(float(words[1]))
                said = stub.reply(body["messages"])
                sent = sum(len(message["content"]) for message in body["messages"])
                usage = {"prompt_tokens": sent // 4, "completion_tokens": len(said) // 4}
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                reply = {
                    "id": "stub", "object": "chat.completion", "created": 0, "model": body["model"],
                    "choices": [] if fault == "no choices" else [choice],
                    "usage": {**usage, "total_tokens": sum(usage.values())},
                }  # fmt: skip
                content = json.dumps(reply).encode()
                if fault == "malformed":
                    content = content[: len(content) // 2]
                if fault == "page":
                    return self._send(200, b"<html>Welcome</html>", kind="text/html")
                return self._send(200, content, promised=len(content) + 50 * (fault == "cut off"))

            def _error(
                self, status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None
            ) -> None:
                self._send(status, json.dumps({"error": {"message": message, "code": code}}).encode(), headers=headers)

            def _send(
                self,
                status: int,
                content: bytes,
                *,
                promised: int | None = None,
                kind: str = "application/json",
                headers: dict[str, str] | None = None,
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content) if promised is None else promised))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                if promised not in (None, len(content)):
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
