"""``steplm chat``: read messages line by line, from a terminal or a pipe, and print the answers."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from steplm.cli.loading import load_torch
from steplm.cli.model_paths import find_model
from steplm.errors import ConfigError

if TYPE_CHECKING:
    from steplm.eval.chat import Message

HELP = """/system TEXT   set the system message and start a new conversation (without TEXT: no system message)
/reset         start a new conversation
/quit          end, as Ctrl-D does; Ctrl-C ends an answer
/help          this"""


def run_chat(
    model: str,
    *,
    system: str | None = None,
    chat_template: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Read messages until the input ends; answers go to standard output, remarks to standard error."""
    found = find_model(model)
    load_torch()
    from steplm.eval.chat import ChatModel
    from steplm.eval.generate import sampling_arguments

    sampling_arguments(temperature, top_p, max_new_tokens)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that invalid UTF-8 fails only its own message
    is_terminal = sys.stdin.isatty()
    chat = ChatModel(found, chat_template=chat_template, device=device)
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  arrow keys in input()
        _remark(f"{model}: {chat.context or 'no limit of'} tokens of context. /help lists the commands.")
    num_replies = 0
    while (line := _read_line(is_terminal)) is not None:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/help":
            _remark(HELP)
        elif command == "/reset":
            history = [message for message in history if message["role"] == "system"]
            _remark("(forgotten)")
        elif command == "/system":
            history = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            _remark("(a new conversation, with this system message)" if history else "(a new conversation)")
        elif command.startswith("/"):
            _remark(f"no command {command}\n{HELP}")
        elif line:
            try:
                reply = chat.reply(
                    [*history, {"role": "user", "content": line}],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed + num_replies,
                    on_text=lambda text: print(text, end="", flush=True),
                )
            except ConfigError as error:  # the message is too long, or the template rejects it
                _remark(f"({error})")
                continue
            print(flush=True)
            num_replies += 1
            if reply.num_messages_left_out:
                first = sum(message["role"] == "system" for message in history[:1])
                history = history[:first] + history[first + reply.num_messages_left_out :]
                _remark(
                    f"(the context of {chat.context} tokens is full: the oldest {reply.num_messages_left_out} messages "
                    "are forgotten)"
                )
            if not reply.ended:
                _remark(f"(cut off after {reply.num_tokens} tokens)")
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": reply.text}]


def _read_line(is_terminal: bool) -> str | None:
    """The next message without its newline; None at the end of the input. Ctrl-C restarts the line."""
    while True:
        try:
            return input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(file=sys.stderr)


def _remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
