"""Chat with a model through its chat template."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.generation.streamers import BaseStreamer

from steplm.data.tokenizer import load_tokenizer
from steplm.errors import ConfigError
from steplm.eval.generate import continued, sampling_arguments
from steplm.files import is_unicode
from steplm.models.folder import as_token_list, load_for_inference
from steplm.models.forward import require_known_tokens
from steplm.units import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """A model's reply to the last message."""

    text: str
    num_tokens: int
    ended: bool  # the model emitted an end-of-turn token
    num_messages_left_out: int = 0  # oldest messages, dropped to fit the context


def read_chat_template(file: str | Path) -> str:
    """Read a Jinja file; raise ``ConfigError`` if it cannot be read."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {file}: {reason(error)}", path=str(file)) from None


def load_chat_tokenizer(model: str | Path, chat_template: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a chat model.

    Args:
        chat_template: a Jinja file, used instead of the tokenizer's own template.

    Raises:
        ConfigError: there is no chat template, or the file cannot be read.
        DataError, HubUnavailable: no tokenizer was found.
    """
    tokenizer = load_tokenizer(model)
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{model} has no chat template, so the format of a question is unknown. Tune it on instructions "
            "(steplm sft), or give the template that it was tuned with (--chat-template FILE).",
            model=str(model),
        )
    return tokenizer


class ChatModel:
    """A model with its chat template.

    Args:
        model: Hugging Face folder or hub name.
        chat_template: a Jinja file, used instead of the tokenizer's own template.

    Raises:
        ConfigError: there is no chat template, the file cannot be read, or the model is not causal.
        CheckpointError, DataError, HubUnavailable: no model or tokenizer was found.
    """

    def __init__(self, model: str | Path, *, chat_template: str | None = None, device: str = "auto") -> None:
        self.tokenizer = load_chat_tokenizer(model, chat_template)  # first: it fails faster than loading weights
        self.model = load_for_inference(model, device)
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # The tokenizer's EOS, and the model's, from generation_config.json or else config.json.
        known = as_token_list(self.model.generation_config.eos_token_id)
        self.stop_ids = list(dict.fromkeys([self.tokenizer.eos_token_id, *known]))

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Token IDs of the messages rendered by the template, including its generation prompt.

        Raises:
            ConfigError: the template rejects the messages, or one is not valid Unicode.
        """
        if not all(is_unicode(message["content"]) for message in messages):
            raise ConfigError("a message is not valid Unicode: it holds a lone surrogate")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program and can raise anything
            raise ConfigError(f"the chat template refuses these messages: {reason(error)}") from None
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def fitted(self, messages: list[Message], max_new_tokens: int) -> tuple[list[int], int]:
        """Trim the conversation to leave room for an answer; return its token IDs and how many messages were dropped.

        The oldest messages are dropped first, but never the system message or the last user message. The room
        reserved is ``max_new_tokens``, at most half of the context.

        Raises:
            ConfigError: the last message alone is too long.
        """
        system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
        first = 0
        while True:
            ids = self.prompt_ids(system + turns[first:])
            if self.context is None or len(ids) + min(max_new_tokens, self.context // 2) <= self.context:
                return ids, first
            later = [i for i, message in enumerate(turns) if i > first and message["role"] == "user"]
            if not later:
                raise ConfigError(
                    f"the message has {len(ids)} tokens with its template; of the model's {self.context} positions "
                    f"{min(max_new_tokens, self.context // 2)} are for the answer. Shorten it.",
                    num_prompt_tokens=len(ids),
                    max_position_embeddings=self.context,
                )
            first = later[0]

    def reply(
        self,
        messages: list[Message],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 0,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Reply:
        """Generate the answer to ``messages``; the same seed gives the same answer.

        Args:
            messages: ``{"role": …, "content": …}`` each; the last one is the user's.
            temperature: 0 is greedy decoding, whatever the seed.
            on_text: called with the text as it is generated, token by token. If the callback or Ctrl-C raises
                KeyboardInterrupt, the answer is the text so far.

        Raises:
            ConfigError: a number is out of range, or an error of ``fitted``.
        """
        sampling = sampling_arguments(temperature, top_p, max_new_tokens)
        ids, num_left_out = self.fitted(messages, max_new_tokens)
        if not ids:
            raise ConfigError("the chat template renders nothing of these messages")
        require_known_tokens(self.model, max(*ids, self.tokenizer.eos_token_id))
        if self.context is not None:
            sampling["max_new_tokens"] = min(max_new_tokens, self.context - len(ids))
        streamer = _Streamer(self.tokenizer, on_text)
        with suppress(KeyboardInterrupt):
            continued(
                self.model,
                ids,
                seed=seed,
                eos_token_id=self.stop_ids,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=streamer,
                **sampling,
            )
        new_ids = streamer.token_ids
        ended = bool(new_ids) and new_ids[-1] in self.stop_ids
        return Reply(streamer.text.rstrip(), len(new_ids), ended, num_left_out)


class _Streamer(BaseStreamer):
    """Streams the text of each new token, and keeps the tokens in case generation is interrupted."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.token_ids: list[int] = []
        self._is_prompt = True
        self._told = ""

    @property
    def text(self) -> str:
        """All text so far, without the spaces that some tokenizers put before the first word."""
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True).lstrip()

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.token_ids += value.flatten().tolist()
        # One character can span several tokens; there is no text to show until the last of them.
        if not self.text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.end()

    def end(self) -> None:
        text = self.text
        if len(text) > len(self._told):
            self.on_text(text[len(self._told) :])
        self._told = text
