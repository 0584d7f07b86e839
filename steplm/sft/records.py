"""Records of instructions -> conversations, whatever columns they come in.

    Alpaca                  instruction, input (may be missing or empty), output
    chat                    messages: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]
    ShareGPT                conversations: [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]
    prompt and completion   prompt, completion: two texts, or two lists of messages

Duplicates stay. What has no answer is dropped, what cannot be read is unusable; both are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from steplm.data.sources import find_sources
from steplm.errors import DataError
from steplm.sft.templates import with_input
from steplm.units import shortened

COLUMNS = ("instruction, output and perhaps input", "messages", "conversations", "prompt and completion")
# Who speaks in ShareGPT's records -> the role in a chat template.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """Messages, ``{"role": …, "content": …}``; those of the assistant after the first ``num_given`` are learned."""

    messages: tuple[Mapping[str, str], ...]
    num_given: int = 0
    place: str = ""  # "FILE:NUMBER", for messages

    def answers(self) -> list[int]:
        """Indices of the messages that are learned."""
        roles = enumerate(message["role"] for message in self.messages)
        return [index for index, role in roles if role == "assistant" and index >= self.num_given]

    def key(self) -> bytes:
        """Equal for equal conversations."""
        return json.dumps([self.num_given, *map(dict, self.messages)], sort_keys=True).encode()


@dataclass
class Records:
    """What the files held."""

    conversations: list[Conversation] = field(default_factory=list)
    num_records: int = 0
    num_empty: int = 0  # without an answer
    unusable: Counter[str] = field(default_factory=Counter)  # by reason
    first_places: dict[str, str] = field(default_factory=dict)  # of each reason

    @property
    def num_unusable(self) -> int:
        return self.unusable.total()

    def add_unusable(self, reason: str, place: str) -> None:
        self.unusable[reason] += 1
        self.first_places.setdefault(reason, place)

    def check(self, max_bad_share: float) -> None:
        """Raise ``DataError``, with the reasons, if more than this share of the records is unusable, or all are."""
        share = self.num_unusable / max(self.num_records, 1)
        if not self.num_unusable or (share <= max_bad_share and self.conversations):
            return
        reasons = "\n".join(
            f"  {count:,} x {reason}, first in {self.first_places[reason]}"
            for reason, count in self.unusable.most_common(5)
        )
        raise DataError(
            f"{self.num_unusable:,} of {self.num_records:,} records ({share:.2%}) are unusable, more than "
            f"max_bad_share={max_bad_share:g}:\n{reasons}\nMend the data, or raise max_bad_share.",
            num_unusable=self.num_unusable,
            num_records=self.num_records,
            max_bad_share=max_bad_share,
        )


def read_conversations(entries: Sequence[str]) -> Records:
    """The records of json, jsonl and parquet files (gzipped or not, folders, globs) or ``hub://…``, in order.

    Raises:
        DataError: an entry that matches nothing or cannot be read.
    """
    records = Records()
    for place, value in _values(entries):
        records.num_records += 1
        try:
            conversation = replace(as_conversation(value), place=place)
        except ValueError as error:
            records.add_unusable(str(error), place)
            continue
        answers = [conversation.messages[index]["content"].strip() for index in conversation.answers()]
        if all(answers) and answers:
            records.conversations.append(conversation)
        else:
            records.num_empty += 1
    return records


def _values(entries: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for source in find_sources(entries):
        for place, value in source.records():
            yield f"{source.name}:{place}", value


def as_conversation(record: Any) -> Conversation:
    """A record of any of the kinds above.

    Raises:
        ValueError: none of them; says the columns found and expected.
    """
    if isinstance(record, Exception):
        raise ValueError(str(record))
    if not isinstance(record, Mapping):
        raise ValueError(f"a {type(record).__name__}, not an object with columns")
    if "instruction" in record and "output" in record:
        question = with_input(_text(record, "instruction"), _text(record, "input", optional=True))
        return Conversation((_message("user", question), _message("assistant", _text(record, "output"))))
    if "messages" in record:
        return Conversation(tuple(_messages(record["messages"], "messages")))
    if "conversations" in record:
        return Conversation(tuple(_spoken(record["conversations"])))
    if "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], str):
            pair = _message("user", record["prompt"]), _message("assistant", _text(record, "completion"))
            return Conversation(pair, num_given=1)
        prompt = _messages(record["prompt"], "prompt")
        return Conversation((*prompt, *_messages(record["completion"], "completion")), num_given=len(prompt))
    found = ", ".join(shortened(name, 40).strip("'") for name in islice(record, 10)) if record else "none"
    raise ValueError(f"the columns are {found}; expected {'; or '.join(COLUMNS)}")


def _text(record: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    return value


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {type(value).__name__}, not a list of messages" if value else f"{name} is empty")
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"a message of {name} is not {{role: text, content: text}}")
    return [_message(message["role"], message["content"]) for message in value]


def _spoken(value: Any) -> list[dict[str, str]]:
    """Of ShareGPT's turns those from the first that is not an answer: many records begin in the midst of a talk."""
    if not isinstance(value, list) or not value:
        what = f"is {type(value).__name__}, not a list of turns" if value else "is empty"
        raise ValueError(f"conversations {what}")
    messages = []
    for turn in value:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise ValueError("a turn of conversations is not {from: text, value: text}")
        if speaker not in SPEAKERS:
            raise ValueError(f"a turn of conversations is from {shortened(speaker)}; known: {', '.join(SPEAKERS)}")
        messages.append(_message(SPEAKERS[speaker], text))
    first = next((index for index, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    return messages[first:]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
