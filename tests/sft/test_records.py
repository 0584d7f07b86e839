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
SYSTEM = {"role": "system", "content": "Be brief."}
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


@pytest.mark.parametrize("record", [ALPACA, PAIR, CHAT, SHARED, LISTS])
def test_the_column_system_is_the_first_message_in_every_form(tmp_path: Path, record: dict[str, Any]) -> None:
    entries = written(
        tmp_path, [{**record, "system": "Be brief."}, {**record, "system": ""}, {**record, "system": None}]
    )
    first, *others = read_conversations(entries).conversations
    assert list(first.messages) == [SYSTEM, *CHAT["messages"]]
    assert first.answers() == [2]
    assert [list(other.messages) for other in others] == [CHAT["messages"]] * 2


def test_a_system_message_that_is_told_twice_stands_once(tmp_path: Path) -> None:
    record = {"system": "Be brief.", "messages": [SYSTEM, *CHAT["messages"]]}
    (conversation,) = read_conversations(written(tmp_path, [record])).conversations
    assert list(conversation.messages) == [SYSTEM, *CHAT["messages"]]


def test_history_is_earlier_turns_and_their_answers_are_learned(tmp_path: Path) -> None:
    record = {**ALPACA, "history": [["Who?", "Me."], ["Where?", "Here."]], "system": "Be brief."}
    (conversation,) = read_conversations(written(tmp_path, [record])).conversations
    assert [message["content"] for message in conversation.messages] == [
        "Be brief.", "Who?", "Me.", "Where?", "Here.", "Say cat.", "cat",
    ]  # fmt: skip
    assert conversation.answers() == [2, 4, 6]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
@pytest.mark.parametrize("form", ["messages", "conversations", "completion"])
def test_an_answer_of_weight_0_is_context_without_a_loss(tmp_path: Path, form: str, mark: dict[str, Any]) -> None:
    question, answer = CHAT["messages"]
    turns = [question, {**answer, **mark}, question, {**answer, "weight": 1, "train": True}]
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names[turn.pop("role")], "value": turn.pop("content"), **turn} for turn in map(dict, turns)]
    record = {form: turns} | ({"prompt": [question]} if form == "completion" else {})
    (conversation,) = read_conversations(written(tmp_path, [record])).conversations
    assert [message["content"] for message in conversation.messages][-4:] == ["Say cat.", "cat"] * 2
    assert conversation.answers() == [len(conversation.messages) - 1]


def test_a_record_whose_answers_all_have_weight_0_is_left_out(tmp_path: Path) -> None:
    question, answer = CHAT["messages"]
    records = read_conversations(written(tmp_path, [{"messages": [question, {**answer, "weight": 0}]}]))
    assert (len(records.conversations), records.num_empty) == (0, 1)


def test_columns_that_are_not_read_are_named_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    set_chat_template(tokenizer, None)
    question, answer = CHAT["messages"]
    named = {"messages": [question, {**answer, "name": "Tom", "tool_calls": None}], "source": "web", "score": None}
    config = SftConfig(validation_fraction=0)
    prepared = prepare_records(
        written(tmp_path, [named, named, {**ALPACA, "id": 7}]), tokenizer, config, sequence_length=999
    )
    (note,) = prepared.notes
    before, _, columns = note.partition(": ")
    assert before == "columns not read"
    assert set(columns.split(", ")) == {
        "source (2 of 3 records)", "messages[].name (2 of 3 records)", "id (1 of 3 records)",
    }  # fmt: skip


def test_answers_that_the_template_changes_in_the_history_are_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    set_chat_template(tokenizer, None)
    only_last = "{% if loop.last %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% else %}"
        + only_last
        + "{% endif %}{% endfor %}"
    )
    entries = written(tmp_path, [{"messages": CHAT["messages"] * 3}])
    prepared = prepare_records(entries, tokenizer, SftConfig(validation_fraction=0), sequence_length=999)
    assert prepared.notes == ("2 earlier answers not learned: the chat template changes them in the history",)


def test_a_list_of_records_under_data_is_read_and_a_bad_one_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.json"
    path.write_text(json.dumps({"data": [ALPACA, CHAT, {"text": "?"}]}))
    records = read_conversations([str(path)])
    assert [list(conversation.messages) for conversation in records.conversations] == [CHAT["messages"]] * 2
    assert (records.num_records, list(records.first_places.values())) == (3, [f"{path}:3"])


def test_the_columns_that_hold_something_decide_what_a_record_is(tmp_path: Path) -> None:
    """Parquet files of several sets put together have every column in every row."""
    every = {name: None for record in (ALPACA, PAIR, CHAT, SHARED) for name in record}
    records = read_conversations(written(tmp_path, [{**every, **record} for record in (ALPACA, PAIR, CHAT, SHARED)]))
    assert [list(conversation.messages) for conversation in records.conversations] == [CHAT["messages"]] * 4


def test_unusable_records_within_the_allowed_share_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    set_chat_template(tokenizer, None)
    entries = written(tmp_path, [ALPACA, {**ALPACA, "output": None}, {**ALPACA, "output": None}])
    config = SftConfig(validation_fraction=0, max_bad_share=0.9)
    prepared = prepare_records(entries, tokenizer, config, sequence_length=999)
    assert prepared.notes == (f"unusable: 2 x output is null, not text, first in {entries[0]}:2",)


def test_few_unusable_records_are_not_blamed_where_the_others_have_no_answer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    set_chat_template(tokenizer, None)
    config = SftConfig(validation_fraction=0, max_bad_share=0.9)
    data = written(tmp_path, [3, {**ALPACA, "output": ""}])
    with pytest.raises(DataError) as caught:
        prepare_records(data, tokenizer, config, sequence_length=128)
    assert "from 2 records: 1 are unusable, 1 have no answer to learn" in str(caught.value)
    assert "1 x a JSON int, not an object with fields, first in" in str(caught.value)


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
        ({"messages": [*CHAT["messages"], {"role": "tool", "content": None}]}, "content: text}: content is null"),
        ({"conversations": {"from": "human"}}, "conversations is dict, not a list of messages"),
        ({"conversations": None}, "conversations is null, not a list"),
        ({"conversations": ["cat"]}, "a message of conversations is not {from: text, value: text}"),
        ({"conversations": [{"from": "human", "value": None}]}, "value is null"),
        ({"conversations": [{"from": "Human", "value": "?"}]}, "is from 'Human'; known: human, user, gpt,"),
        ({"conversations": [{"role": "user", "value": "?"}]}, "{role: text, content: text}: content is missing"),
        ({**PAIR, "completion": None}, "completion is null"),
        ({**ALPACA, "instruction": None}, "instruction is null, not text"),
        ({**ALPACA, "system": 1}, "system is int, not text"),
        ({**ALPACA, "history": [["Who?"]]}, "history is not a list of pairs"),
        ({**ALPACA, "history": "Who?"}, "history is not a list of pairs"),
        (
            {**CHAT, "messages": [{**CHAT["messages"][0], "weight": 0.5}]},
            "weight of a message of messages is 0.5, not 0",
        ),
        ({"system": "A.", "messages": [SYSTEM, *CHAT["messages"]]}, "two different system messages"),
        ({**ALPACA, "output": "cat \ud83d"}, "a lone surrogate, which is not valid Unicode, in output"),
        ({**ALPACA, "history": [["a", "\udc00"]]}, "a lone surrogate, which is not valid Unicode, in history"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "a lone surrogate, which is not valid Unicode, in a"),
        ({"version": 1, "data": 3}, "the columns are version, data; expected"),
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


@pytest.mark.parametrize(
    "record",
    [
        '{"prompt": "Say cat.", "completion": "cat", "completion": "dog"}',
        '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "role": "user", "content": "cat"}]}',
    ],
)
def test_a_record_with_a_repeated_key_is_unusable(tmp_path: Path, record: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{record}\n")
    records = read_conversations([str(path)])
    key = "role" if "role" in record else "completion"
    assert records.unusable == {f"the key '{key}' is repeated": 1}
    assert len(records.conversations) == 1


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
    assert dropped.counts()["dropped as too long"] == 2
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
