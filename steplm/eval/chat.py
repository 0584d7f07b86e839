"""A conversation with a model, by its chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from steplm.data.tokenizer import load_tokenizer
from steplm.errors import ConfigError
from steplm.eval.generate import sampling_arguments
from steplm.files import is_unicode
from steplm.models.device import resolve_device
from steplm.models.folder import load_pretrained
from steplm.units import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What a model said to the last message."""

    text: str
    num_tokens: int
    ended: bool  # by itself, at a token that ends a turn
    num_messages_left_out: int = 0  # the oldest, that had no room in the context


def read_chat_template(file: str | Path) -> str:
    """A Jinja file; ``ConfigError`` where it cannot be read."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {file}: {reason(error)}", path=str(file)) from None


def load_chat_tokenizer(model: str | Path, chat_template: str | Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model that can chat.

    Args:
        chat_template: a Jinja file, in place of the tokenizer's own.

    Raises:
        ConfigError: no template, or no such file.
        DataError, HubUnavailable: no tokenizer there.
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
        chat_template: a Jinja file, in place of the tokenizer's own.

    Raises:
        ConfigError: no template, or no such file.
        CheckpointError, DataError, HubUnavailable: no model or tokenizer there.
    """

    def __init__(self, model: str | Path, *, chat_template: str | None = None, device: str = "auto") -> None:
        self.tokenizer = load_chat_tokenizer(model, chat_template)  # in no time; the weights take theirs
        self.model = load_pretrained(model).to(resolve_device(device)).eval()
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.stop_ids = _stop_ids(model, self.tokenizer.eos_token_id)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The tokens that the model is given: the template's, which asks for an answer.

        Raises:
            ConfigError: the template refuses the messages, or one is not valid Unicode.
        """
        if not all(is_unicode(message["content"]) for message in messages):
            raise ConfigError("a message is not valid Unicode: it holds a lone surrogate")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ConfigError(f"the chat template refuses these messages: {reason(error)}") from None
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def fitted(self, messages: list[Message], max_new_tokens: int) -> tuple[list[int], int]:
        """Tokens of as much of the conversation as leaves room for an answer, and how many messages were left out.

        The oldest go first, but neither a system message nor what the user said last. The room is
        ``max_new_tokens``, at most half of the context.

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
        """The answer to ``messages``; the same seed gives the same one.

        Args:
            messages: ``{"role": …, "content": …}``, the user's last.
            temperature: 0 takes the likeliest token each time, whatever the seed.
            on_text: given the text as it comes, token by token. Where it, or Ctrl-C, raises KeyboardInterrupt, the
                answer ends with what there is.

        Raises:
            ConfigError: a number out of range, or as ``fitted``.
        """
        sampling = sampling_arguments(temperature, top_p, max_new_tokens)
        ids, num_left_out = self.fitted(messages, max_new_tokens)
        if self.context is not None:
            sampling["max_new_tokens"] = min(max_new_tokens, self.context - len(ids))
        streamer = _Streamer(self.tokenizer, on_text)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.model.generate(
                    torch.tensor([ids], device=self.model.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                    eos_token_id=self.stop_ids,
                    pad_token_id=self.tokenizer.eos_token_id,
                    use_cache=True,
                    streamer=streamer,
                    **sampling,
                )
        except KeyboardInterrupt:
            pass
        new_ids = streamer.token_ids
        ended = bool(new_ids) and new_ids[-1] in self.stop_ids
        return Reply(streamer.text.rstrip(), len(new_ids), ended, num_left_out)


class _Streamer(BaseStreamer):
    """Hands on the text of each token, and keeps the tokens for whoever is interrupted."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.token_ids: list[int] = []
        self._is_prompt = True
        self._told = ""

    @property
    def text(self) -> str:
        """All of it, without the spaces that some tokenizers put before a first word."""
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True).lstrip()

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.token_ids += value.flatten().tolist()
        # The bytes of one character can be several tokens; until the last of them there is no text to show.
        if not self.text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.end()

    def end(self) -> None:
        text = self.text
        if len(text) > len(self._told):
            self.on_text(text[len(self._told) :])
        self._told = text


def _stop_ids(model: str | Path, eos_token_id: int) -> list[int]:
    """Tokens that end a turn: the tokenizer's, and those of the folder's generation defaults."""
    try:
        known = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        known = None
    known_ids = known if isinstance(known, list) else [] if known is None else [known]
    return list(dict.fromkeys([eos_token_id, *known_ids]))
