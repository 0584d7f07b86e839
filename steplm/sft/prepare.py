"""Turns conversations into examples of limited length, split by hash into training and held-out examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from steplm.data.loader import IGNORE_INDEX, Batch
from steplm.errors import DataError
from steplm.sft.config import SftConfig
from steplm.sft.encode import Encoder, Example
from steplm.sft.records import Records, read_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_COLUMNS = 10  # listed in a note


@dataclass(frozen=True)
class Prepared:
    """Examples, and counts of what became of the records."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    num_records: int
    num_empty: int
    num_unusable: int
    num_truncated: int  # among the records used
    num_too_long: int  # dropped: truncation would leave no token of the answer, or too_long=drop
    end_ids: tuple[int, ...]  # tokens that end an answer
    notes: tuple[str, ...] = ()  # for people: columns not read, and why records are unusable

    @property
    def num_train_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.train)

    @property
    def num_answer_tokens(self) -> int:
        return sum(example.num_answer_tokens for example in self.train)

    def counts(self) -> dict[str, int]:
        """What became of the records, for people and programs."""
        return {
            "records": self.num_records,
            "train": len(self.train),
            "validation": len(self.validation),
            "dropped without an answer": self.num_empty,
            "dropped as too long": self.num_too_long,
            "truncated": self.num_truncated,
            "dropped as unusable": self.num_unusable,
        }


def prepare_records(
    entries: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: SftConfig, *, sequence_length: int
) -> Prepared:
    """Read, encode, truncate and split the records; equal conversations fall on the same side of the split.

    Args:
        sequence_length: maximum tokens of an example.

    Raises:
        DataError: there is nothing to learn from, or the share of unusable records exceeds ``config.max_bad_share``.
    """
    records = read_conversations(entries)
    encoder = Encoder(tokenizer, uses_template=config.chat_template != "none")
    sides: dict[bool, list[Example]] = {False: [], True: []}
    end_ids: set[int] = set()
    num_truncated = num_too_long = 0
    for conversation in records.conversations:
        try:
            example = encoder.encode(conversation)
        except ValueError as error:
            records.add_unusable(str(error), conversation.place)
            continue
        end_ids.add(example.labels[-1])
        is_long = len(example.input_ids) > sequence_length
        if is_long:
            example = example.cut(sequence_length)
        if not example.num_answer_tokens or (is_long and config.too_long == "drop"):
            num_too_long += 1
            continue
        num_truncated += is_long
        sides[_is_held_out(conversation.key(), config.validation_fraction)].append(example)
    records.check(config.max_bad_share)
    if not sides[False]:
        raise DataError(_nothing_left(records, num_too_long, sequence_length), num_records=records.num_records)
    return Prepared(
        tuple(sides[False]),
        tuple(sides[True]),
        num_records=records.num_records,
        num_empty=records.num_empty,
        num_unusable=records.num_unusable,
        num_truncated=num_truncated,
        num_too_long=num_too_long,
        end_ids=tuple(sorted(end_ids)),
        notes=tuple(_notes(records, sum(example.num_skipped_answers for example in (*sides[False], *sides[True])))),
    )


def _notes(records: Records, num_skipped_answers: int) -> Iterator[str]:
    if records.unread:
        shown = [
            f"{name} ({count:,} of {records.num_records:,} records)"
            for name, count in records.unread.most_common(MOST_COLUMNS)
        ]
        if (more := len(records.unread) - MOST_COLUMNS) > 0:
            shown.append(f"and {more:,} more")
        yield f"columns not read: {', '.join(shown)}"
    if num_skipped_answers:
        yield f"{num_skipped_answers:,} earlier answers not learned: the chat template changes them in the history"
    yield from (f"unusable: {line}" for line in records.reasons())


def _is_held_out(key: bytes, fraction: float) -> bool:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") < fraction * 2**64


def _nothing_left(records: Records, num_too_long: int, sequence_length: int) -> str:
    unusable = f"{records.num_unusable:,} are unusable, " if records.num_unusable else ""
    return (
        f"nothing to learn from {records.num_records:,} records: {unusable}{records.num_empty:,} have no answer to "
        f"learn, {num_too_long:,} no token of it within sequence_length={sequence_length}. "
        "Name other data, or raise sequence_length; with few records also lower validation_fraction."
        + "".join(f"\n  {line}" for line in records.reasons())
    )


def batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Batches for the held-out loss, with shifted labels; padded on the right, where causal attention never sees it."""
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    for first in range(0, len(ordered), batch_size):
        some = ordered[first : first + batch_size]
        inputs = [torch.tensor(example.input_ids[:-1]) for example in some]
        labels = [torch.tensor(example.labels[1:]) for example in some]
        yield Batch(pad_sequence(inputs, True), pad_sequence(labels, True, IGNORE_INDEX))
