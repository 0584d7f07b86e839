"""Reads instruction records as conversations, in any of these column formats.

    Alpaca                  instruction, input (may be missing or empty), output; history: [["question", "answer"], …]
    chat                    messages: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]
    ShareGPT                conversations: [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]
    prompt and completion   prompt, completion: two texts, or two lists of messages

Any of them may have a ``system`` text. An answer with ``weight: 0`` or ``train: false`` is context without a loss.
Duplicates are kept. Records without an answer to learn are dropped, and records that cannot be read are unusable; both
are counted. Columns that are not read are reported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from steplm.data.sources import find_sources
from steplm.errors import DataError
from steplm.files import is_unicode
from steplm.sft.templates import with_input
from steplm.units import shortened

# Columns that identify a kind of record -> all columns read from it.
KINDS = {
    ("instruction", "output"): ("instruction", "input", "output", "history", "system"),
    ("messages",): ("messages", "system"),
    ("conversations",): ("conversations", "system"),
    ("prompt", "completion"): ("prompt", "completion", "system"),
}
EXPECTED = "instruction, output and perhaps input; or messages; or conversations; or prompt and completion"
MESSAGE_KEYS = ("role", "content", "from", "value", "weight", "train")
FIELDS = tuple(dict.fromkeys(field for fields in KINDS.values() for field in fields))  # all columns that are read
# Speaker in ShareGPT records -> role in a chat template.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MOST_REASONS = 5  # listed in one message


@dataclass(frozen=True)
class Conversation:
    """A conversation of ``{"role": …, "content": …}`` messages.

    Attributes:
        num_given: number of leading messages that are a prompt; answers among them are not learned.
        unlearned: indices of further answers that are not learned.
        place: ``FILE:NUMBER``, for error messages.
        unread: columns of the record, and keys of its messages, that are not read.
    """

    messages: tuple[Mapping[str, str], ...]
    num_given: int = 0
    unlearned: frozenset[int] = frozenset()
    place: str = ""
    unread: frozenset[str] = frozenset()

    def answers(self) -> list[int]:
        """Indices of the messages that are learned."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index >= self.num_given and index not in self.unlearned
        ]

    def key(self) -> bytes:
        """A key that is equal for equal conversations."""
        return json.dumps([self.num_given, *map(dict, self.messages)], sort_keys=True).encode()


@dataclass
class Records:
    """The conversations read from the files, and counts of the other records."""

    conversations: list[Conversation] = field(default_factory=list)
    num_records: int = 0
    num_empty: int = 0  # without an answer to learn
    unusable: Counter[str] = field(default_factory=Counter)  # by reason
    first_places: dict[str, str] = field(default_factory=dict)  # by reason
    unread: Counter[str] = field(default_factory=Counter)  # number of records, by column that is not read

    @property
    def num_unusable(self) -> int:
        return self.unusable.total()

    def add_unusable(self, reason: str, place: str) -> None:
        self.unusable[reason] += 1
        self.first_places.setdefault(reason, place)

    def reasons(self) -> list[str]:
        """Why records are unusable: one line for each of the most common reasons, with the first record's place."""
        return [
            f"{count:,} x {reason}, first in {self.first_places[reason]}"
            for reason, count in self.unusable.most_common(MOST_REASONS)
        ]

    def check(self, max_bad_share: float) -> None:
        """Raise ``DataError``, with the reasons, if more than this share of the records is unusable."""
        share = self.num_unusable / max(self.num_records, 1)
        if share <= max_bad_share:
            return
        reasons = "".join(f"\n  {line}" for line in self.reasons())
        raise DataError(
            f"{self.num_unusable:,} of {self.num_records:,} records ({share:.2%}) are unusable, more than "
            f"max_bad_share={max_bad_share:g}:{reasons}\nFix the data, or raise max_bad_share.",
            num_unusable=self.num_unusable,
            num_records=self.num_records,
            max_bad_share=max_bad_share,
        )


def read_conversations(entries: Sequence[str]) -> Records:
    """Read the records of json, jsonl and parquet files (gzipped or not, folders, globs) or ``hub://…``, in order.

    Raises:
        DataError: an entry matches nothing or cannot be read.
    """
    records = Records()
    for place, value in _values(entries):
        records.num_records += 1
        try:
            conversation = replace(as_conversation(value), place=place)
        except ValueError as error:
            records.add_unusable(str(error), place)
            continue
        records.unread.update(conversation.unread)
        answers = [conversation.messages[index]["content"].strip() for index in conversation.answers()]
        if all(answers) and answers:
            records.conversations.append(conversation)
        else:
            records.num_empty += 1
    return records


def _values(entries: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for source in find_sources(entries):
        for place, value in source.records(FIELDS):
            yield f"{source.name}:{place}", value


def as_conversation(record: Any) -> Conversation:
    """Convert a record of any kind in ``KINDS``.

    Raises:
        ValueError: the record is of no such kind (the message names the columns found and expected), or is invalid.
    """
    if isinstance(record, Exception):
        raise ValueError(str(record))
    if not isinstance(record, Mapping):
        raise ValueError(f"a {type(record).__name__}, not an object with columns")
    kind = _kind(record)
    if kind is None:
        found = ", ".join(shortened(name, 40).strip("'") for name in islice(record, 10)) if record else "none"
        raise ValueError(f"the columns are {found}; expected {EXPECTED}")
    num_given = 0
    if kind == ("instruction", "output"):
        turns = _alpaca(record)
    elif kind == ("conversations",):
        turns = _from_first_question(_messages(record, "conversations"))
    elif kind == ("messages",):
        turns = _messages(record, "messages")
    elif isinstance(record["prompt"], str):
        turns, num_given = [Turn("user", _text(record, "prompt")), Turn("assistant", _text(record, "completion"))], 1
    else:
        prompt = _messages(record, "prompt")
        turns, num_given = [*prompt, *_messages(record, "completion")], len(prompt)
    if (system := _text(record, "system", optional=True)) and not (turns and turns[0].role == "system"):
        turns, num_given = [Turn("system", system), *turns], num_given + bool(num_given)
    elif system and turns[0].content != system:
        raise ValueError("two different system messages: the column system, and the first message")
    return Conversation(
        tuple({"role": turn.role, "content": turn.content} for turn in turns),
        num_given,
        frozenset(index for index, turn in enumerate(turns) if not turn.is_learned),
        unread=_unread(record, kind),
    )


class Turn(NamedTuple):
    """A message of a record being read; ``is_learned`` only matters for answers."""

    role: str
    content: str
    is_learned: bool = True


def _kind(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The kind whose columns are present; one with null values only if no other kind fits."""
    complete = (kind for kind in KINDS if all(record.get(name) is not None for name in kind))
    return next(complete, next((kind for kind in KINDS if all(name in record for name in kind)), None))


def _unread(record: Mapping[str, Any], kind: tuple[str, ...]) -> frozenset[str]:
    unread = {str(name) for name, value in record.items() if name not in KINDS[kind] and value is not None}
    for column in kind:
        for message in record[column] if isinstance(record[column], list) else ():
            unread |= {f"{column}[].{key}" for key in message if key not in MESSAGE_KEYS and message[key] is not None}
    return frozenset(unread)


def _alpaca(record: Mapping[str, Any]) -> list[Turn]:
    """Earlier turns, then the question and its answer; earlier answers are learned too, as in LLaMA-Factory."""
    history = record.get("history") or ()
    pairs = isinstance(history, list | tuple) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise ValueError("history is not a list of pairs, each a question and its answer")
    earlier = [
        Turn(role, _unicode(text, "history"))
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    question = with_input(_text(record, "instruction"), _text(record, "input", optional=True))
    return [*earlier, Turn("user", question), Turn("assistant", _text(record, "output"))]


def _messages(record: Mapping[str, Any], column: str) -> list[Turn]:
    """The messages of a column, in chat or ShareGPT format."""
    value = record[column]
    if not isinstance(value, list):
        raise ValueError(f"{column} is {_described(value)}, not a list of messages")
    if not value:
        raise ValueError(f"{column} is empty")
    is_shared = column == "conversations" and not any("role" in each for each in value if isinstance(each, Mapping))
    speaker, said = ("from", "value") if is_shared else ("role", "content")
    turns = []
    for message in value:
        form = f"a message of {column} is not {{{speaker}: text, {said}: text}}"
        if not isinstance(message, Mapping):
            raise ValueError(form)
        for key in (speaker, said):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{form}: {key} is {_described(message[key]) if key in message else 'missing'}")
        role = message[speaker]
        if is_shared and role not in SPEAKERS:
            raise ValueError(f"a message of {column} is from {shortened(role)}; known: {', '.join(SPEAKERS)}")
        role = SPEAKERS[role] if is_shared else _unicode(role, f"{speaker} of a message of {column}")
        content = _unicode(message[said], f"a message of {column}")
        turns.append(Turn(role, content, _is_learned(message, column)))
    return turns


def _is_learned(message: Mapping[str, Any], column: str) -> bool:
    for key in ("weight", "train"):
        if message.get(key) not in (None, 0, 1):
            raise ValueError(f"{key} of a message of {column} is {shortened(message[key])}, not 0, 1, false or true")
    return all(message.get(key) in (None, 1) for key in ("weight", "train"))


def _from_first_question(turns: Sequence[Turn]) -> list[Turn]:
    """Drop answers before the first question: many ShareGPT records begin in the middle of a conversation."""
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), len(turns))
    return [turn for index, turn in enumerate(turns) if index > first or turn.role != "assistant"]


def _text(record: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_described(value)}, not text")
    return _unicode(value, name)


def _unicode(text: str, where: str) -> str:
    if not is_unicode(text):
        raise ValueError(f"a lone surrogate, which is not valid Unicode, in {where}")
    return text


def _described(value: Any) -> str:
    return "null" if value is None else type(value).__name__
