"""Records in every form, and the fate of those that teach nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from steplm.errors import DataError
from steplm.sft.config import SftConfig
from steplm.sft.prepare import prepare_records
from steplm.sft.records import read_conversations
from steplm.sft.templates import set_chat_template

ALPACA = {"instruction": "Say cat.", "input": "", "output": "cat"}
PAIR = {"prompt": "Say cat.", "completion": "cat"}
CHAT = {"messages": [{"role": "user", "content": "Say cat."}, {"role": "assistant", "content": "cat"}]}
SHARED = {"conversations": [{"from": "human", "value": "Say cat."}, {"from": "gpt", "value": "cat"}], "id": "1"}
LISTS = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}


def written(tmp_path: Path, records: list[Any], name: str = "records.json") -> list[str]:
    path = tmp_path / name
    lines = "\n".join(map(json.dumps, records)) if ".jsonl" in name else json.dumps(records)
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return [str(path)]


@pytest.mark.parametrize("name", ["records.json", "records.json.gz", "records.jsonl", "records.jsonl.gz"])
@pytest.mark.parametrize("record", [ALPACA, PAIR, CHAT, SHARED, LISTS])
def test_the_same_lesson_is_read_from_every_form(tmp_path: Path, record: dict[str, Any], name: str) -> None:
    records = read_conversations(written(tmp_path, [record, record], name))
    assert [list(conversation.messages) for conversation in records.conversations] == [CHAT["messages"]] * 2
    assert [conversation.answers() for conversation in records.conversations] == [[1], [1]]


@pytest.mark.parametrize("record", [CHAT, SHARED])
def test_parquet_is_read_too(tmp_path: Path, record: dict[str, Any]) -> None:
    from datasets import Dataset

    Dataset.from_list([record, record]).to_parquet(tmp_path / "records.parquet")
    (first, _) = read_conversations([str(tmp_path / "records.parquet")]).conversations
    assert list(first.messages) == CHAT["messages"]


def test_records_without_an_answer_are_counted_and_duplicates_stay(tmp_path: Path) -> None:
    empty = [{**ALPACA, "output": " "}, {"messages": CHAT["messages"][:1]}, {**PAIR, "completion": ""}]
    records = read_conversations(written(tmp_path, [ALPACA, *empty, ALPACA]))
    assert (len(records.conversations), records.num_empty, records.num_unusable) == (2, 3, 0)


def test_turns_before_the_first_question_are_left_out_and_what_has_no_answer_after_it_is_empty(tmp_path: Path) -> None:
    begun = {"conversations": [{"from": "gpt", "value": "And so on."}, *SHARED["conversations"]]}
    only = {"conversations": [{"from": "gpt", "value": "cat"}]}
    asked = {"conversations": [{"from": "system", "value": "Be brief."}, SHARED["conversations"][0]]}
    records = read_conversations(written(tmp_path, [begun, only, asked]))
    assert [list(conversation.messages) for conversation in records.conversations] == [CHAT["messages"]]
    assert (records.num_empty, records.num_unusable) == (2, 0)


def test_missing_columns_are_one_error_with_those_found_and_expected(tmp_path: Path) -> None:
    records = read_conversations(written(tmp_path, [{"question": "Say cat.", "answer": "cat"}] * 3))
    with pytest.raises(DataError) as caught:
        records.check(0.001)
    message = str(caught.value)
    assert "3 of 3 records" in message
    assert message.count("the columns are question, answer; expected instruction, output") == 1
    assert "messages; or conversations; or prompt and completion" in message
    assert "records.json:1" in message


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**ALPACA, "output": 3}, "output is int, not text"),
        ({"messages": "cat"}, "messages is str, not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, "a message of messages is not"),
        ({"messages": [*CHAT["messages"], {"role": "tool", "content": None}]}, "a message of messages is not"),
        ({"conversations": {"from": "human"}}, "conversations is dict, not a list of turns"),
        ({"conversations": None}, "conversations is empty"),
        ({"conversations": ["cat"]}, "a turn of conversations is not {from: text, value: text}"),
        ({"conversations": [{"from": "human", "value": None}]}, "a turn of conversations is not"),
        ({"conversations": [{"from": "Human", "value": "?"}]}, "is from 'Human'; known: human, user, gpt,"),
        ({**PAIR, "completion": None}, "completion is NoneType"),
        ("cat", "not an object"),
        ({}, "the columns are none"),
    ],
)
def test_a_record_of_another_shape_says_what_is_wrong(tmp_path: Path, record: Any, words: str) -> None:
    records = read_conversations(written(tmp_path, [ALPACA, record]))
    assert records.num_unusable == 1
    assert words in next(iter(records.unusable))
    with pytest.raises(DataError, match=r"1 of 2 records \(50\.00%\)"):
        records.check(0.001)
    records.check(0.5)


def test_a_record_too_long_is_cut_or_dropped_and_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    set_chat_template(tokenizer, None)
    long_answer, long_prompt = {**ALPACA, "output": "cat " * 50}, {**ALPACA, "instruction": "Say cat. " * 50}
    entries = written(tmp_path, [ALPACA, long_answer, long_prompt])
    short = prepare_records(entries[:1], tokenizer, SftConfig(validation_fraction=0), sequence_length=10_000)
    length = len(short.train[0].input_ids) + 5
    cut = prepare_records(entries, tokenizer, SftConfig(validation_fraction=0), sequence_length=length)
    assert (len(cut.train), cut.num_truncated, cut.num_too_long) == (2, 1, 1)
    assert len(cut.train[1].input_ids) == length
    assert cut.train[1].labels[-1] == cut.train[1].input_ids[-1] != tokenizer.eos_token_id
    config = SftConfig(validation_fraction=0, too_long="drop")
    dropped = prepare_records(entries, tokenizer, config, sequence_length=length)
    assert (len(dropped.train), dropped.num_truncated, dropped.num_too_long) == (1, 0, 2)
    assert dropped.counts()["too long, dropped"] == 2
    with pytest.raises(DataError, match="nothing to learn from 3 records"):
        prepare_records(entries, tokenizer, SftConfig(), sequence_length=3)


def test_equal_records_are_held_out_together_and_the_share_is_what_was_asked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    set_chat_template(tokenizer, None)
    records = [{**ALPACA, "instruction": f"Say {number}."} for number in range(200)]
    entries = written(tmp_path, records * 2)
    prepared = prepare_records(entries, tokenizer, SftConfig(validation_fraction=0.2), sequence_length=10_000)
    held_out = [tuple(example.input_ids) for example in prepared.validation]
    assert len(held_out) == 2 * len(set(held_out))
    assert not {tuple(example.input_ids) for example in prepared.train} & set(held_out)
    assert 0.1 < len(held_out) / 400 < 0.3


def test_a_few_records_with_special_tokens_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    set_chat_template(tokenizer, None)
    entries = written(tmp_path, [ALPACA, {**ALPACA, "output": "cat<|endoftext|>"}])
    config = SftConfig(max_bad_share=0.5, validation_fraction=0)
    prepared = prepare_records(entries, tokenizer, config, sequence_length=10_000)
    assert (len(prepared.train), prepared.num_unusable) == (1, 1)
    with pytest.raises(DataError, match=r"special token .*records\.json:2"):
        prepare_records(entries, tokenizer, SftConfig(), sequence_length=10_000)


def test_the_nine_records_of_alpaca_without_an_answer_are_dropped(shared_data: Path) -> None:
    records = read_conversations([str(shared_data / "alpaca/alpaca_18k.json.gz")])
    assert (records.num_records, records.num_empty, records.num_unusable) == (18217, 9, 0)
