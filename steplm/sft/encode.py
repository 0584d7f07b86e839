"""Encodes conversations as token IDs and labels; labels are the answers' tokens, and -100 everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

from steplm.data.loader import IGNORE_INDEX
from steplm.sft.records import Conversation
from steplm.units import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One record, with unshifted labels as Hugging Face models expect them."""

    input_ids: list[int]
    labels: list[int]
    num_skipped_answers: int = 0  # that the template renders differently in the history

    @property
    def num_answer_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels[1:])  # the first token is never predicted

    def cut(self, length: int) -> Example:
        return replace(self, input_ids=self.input_ids[:length], labels=self.labels[:length])


class Encoder:
    """Encodes with the tokenizer's chat template or, without one, the prompt and completion verbatim.

    The tokens before an answer are the same as at inference. The last answer ends with a token that ends generation,
    and that token has a label.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, uses_template: bool = True) -> None:
        self.tokenizer = tokenizer
        self.uses_template = uses_template
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}
        self._special_texts = tuple(special)
        self._special = frozenset(special.values()) - {tokenizer.unk_token_id}  # a character unknown ends nothing

    def encode(self, conversation: Conversation) -> Example:
        """Encode as token IDs and labels.

        Raises:
            ValueError: the template rejects the conversation, or a message's text contains a special token, which
                would end a turn early.
        """
        pieces = self._rendered(conversation) if self.uses_template else self._as_it_stands(conversation)
        ids = self._encoded([text for text, _ in pieces])
        labels = [
            [*part] if is_answer else [IGNORE_INDEX] * len(part)
            for part, (_, is_answer) in zip(ids, pieces, strict=True)
        ]
        num_skipped = len(conversation.answers()) - sum(is_answer for _, is_answer in pieces)
        example = Example(list(chain(*ids)), list(chain(*labels)), num_skipped)
        if example.labels[-1] not in self._special:
            end = self.tokenizer.eos_token_id
            example = replace(example, input_ids=[*example.input_ids, end], labels=[*example.labels, end])
        return example

    def _rendered(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """Consecutive chunks of the text, each with whether it is an answer; the last one is."""
        answers = conversation.answers()
        messages = conversation.messages[: answers[-1] + 1]  # there is nothing to learn after the last answer
        for message in messages:
            if found := next((text for text in self._special_texts if text in message["content"]), None):
                raise ValueError(f"the special token {found} in a message")
        whole = self._render(messages)
        for message in messages:
            if message["role"] != "assistant" and message["content"].strip() not in whole:
                raise ValueError(f"the chat template leaves out the {message['role']} message")
        pieces: list[tuple[str, bool]] = []
        position = 0
        for index in answers:
            before = self._render(messages[:index], add_generation_prompt=True)
            # The model need not generate what follows the end-of-turn token, often a newline.
            after = self._render(messages[: index + 1]).rstrip()
            if not whole.startswith(after):  # some templates (Phi-3) put EOS at the end of a conversation
                after = after.removesuffix(self.tokenizer.eos_token).rstrip()
            continues = whole.startswith(before) and whole.startswith(after)
            answer = after[len(before) :]
            if continues and _without_spaces(messages[index]["content"]) in _without_spaces(answer):
                pieces += [(whole[position : len(before)], False), (answer, True)]
                position = len(after)
            elif index == answers[-1]:
                how = "leaves out or changes" if continues else "does not continue its own prompt by"
                raise ValueError(f"the chat template {how} the answer")
            # else the template renders this earlier answer differently in the history, so it is not learned
        return pieces

    def _render(self, messages: Sequence[Any], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program and can raise anything
            raise ValueError(f"the chat template refuses it: {reason(error)}") from None
        return str(text)

    def _as_it_stands(self, conversation: Conversation) -> list[tuple[str, bool]]:
        if conversation.num_given != 1 or len(conversation.messages) != 2:
            raise ValueError("chat_template=none is for prompt and completion in two texts")
        prompt, completion = (message["content"] for message in conversation.messages)
        begin = self.tokenizer.bos_token or ""
        return [(prompt if prompt.startswith(begin) else begin + prompt, False), (completion, True)]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each chunk, from encoding the whole text and splitting it at the chunk boundaries.

        If a token would span a boundary, each chunk is encoded separately, since at inference the prompt is alone.
        """
        until = [self._ids(text) for text in accumulate(texts)]
        whole = until[-1]
        if all(whole[: len(ids)] == ids for ids in until):
            starts = [0, *map(len, until)]
            return [whole[start:end] for start, end in pairwise(starts)]
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def _without_spaces(text: str) -> str:
    """Templates strip answers, or put the tags of reasoning on lines of their own."""
    return "".join(text.split())
