"""Local evaluation sets: what is read, and what is refused with one message."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from steplm.errors import DataError
from steplm.eval.local_sets import (
    hellaswag_lines,
    hellaswag_query,
    last_word,
    multiple_choice,
    partial_scoring,
)

CHOICE = {"query": "Question: What falls?\n", "choices": ["rain", "a hill"], "gold": 0}
ENDINGS = ["opens it.", "eats the door.", "is a door.", "[step] sings  [note]."]


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_are_read_packed_or_not_and_other_fields_are_left_out(tmp_path: Path) -> None:
    text = json.dumps({**CHOICE, "source": "x"}) + "\n\n"
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "bzipped.jsonl.bz2").write_bytes(bz2.compress(text.encode()))
    for name in ("plain", "zipped", "bzipped"):
        found = multiple_choice(folder=str(tmp_path), file=f"{name}.jsonl", version=1.0)
        assert found["test"].to_list() == [CHOICE]


def test_hellaswag_is_six_lines_an_item(tmp_path: Path) -> None:
    text = "\n".join(["Doors: A man walks. he", "2", *ENDINGS, "Health: Rest well.", "0", *ENDINGS]) + "\n\n"
    (tmp_path / "h.txt.bz2").write_bytes(bz2.compress(text.encode()))
    items = hellaswag_lines(folder=str(tmp_path), file="h.txt")["test"].to_list()
    assert [item["gold"] for item in items] == [2, 0]
    assert [item["query"] for item in items] == ["Doors: A man walks. He", "Health: Rest well."]
    assert items[0]["choices"] == [*ENDINGS[:3], " sings ."]


@pytest.mark.parametrize(
    ("context", "query"),
    [
        ("Doors: A man walks. he", "Doors: A man walks. He"),
        ("Doors: A man walks. he sees. the other man", "Doors: A man walks. he sees. The other man"),
        ("Doors: He asks \"who?\" a woman in red", "Doors: He asks \"who?\" A woman in red"),
        ("Health: Rest. drink water.", "Health: Rest. drink water."),
        ("Health: See [a page | this page] first.", "Health: See first."),
        ("No sentence before it", "No sentence before it"),
    ],
)  # fmt: skip
def test_the_half_sentence_of_a_caption_begins_with_a_capital(context: str, query: str) -> None:
    assert hellaswag_query(context) == query


@pytest.mark.parametrize(
    ("read", "record", "message"),
    [
        (multiple_choice, {"query": "a", "choices": ["b", "c"]}, r"line 2: no field 'gold' \(its fields: choices"),
        (multiple_choice, {**CHOICE, "choices": ["one"]}, "'choices' must be two texts or more"),
        (multiple_choice, {**CHOICE, "choices": ["one", " "]}, "'choices' must be two texts or more"),
        (multiple_choice, {**CHOICE, "gold": 2}, "line 2: gold is 2, but there are 2 choices"),
        (multiple_choice, {**CHOICE, "gold": True}, "'gold' must be a number from 0"),
        (multiple_choice, {**CHOICE, "query": ""}, "'query' must be a text that is not empty"),
        (multiple_choice, {**CHOICE, "query": "half \ud83d"}, "has no lone surrogate"),
        (multiple_choice, [1], r"line 2: expected an object, not \[1\]"),
        (
            multiple_choice,
            {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": ""},
            "no right answer",
        ),
        (multiple_choice, {"question": "a", "choices": None, "answerKey": "A"}, "no right answer"),
        (
            multiple_choice,
            {"question": "a", "choices": {"text": ["b", "c", "d"], "label": ["A", "B", "B"]}, "answerKey": "B"},
            "3 choices, 2 different labels",
        ),
        (multiple_choice, {"passage": "a", "question": "b", "label": 0.7}, "0.7 is no whole number"),
        (
            multiple_choice,
            {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1.7},
            "1.7 is no whole number",
        ),
        (partial_scoring, {"sentence": "a _", "option1": "b", "option2": "c", "answer": ""}, "no right answer"),
        (partial_scoring, {"context_options": "ab", "continuation": "c", "gold": 0}, "'context_options' must be"),
        (last_word, {"context": "a", "text": "b"}, r"no field 'continuation' \(its fields: context, text\)"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path: Path, read: Any, record: Any, message: str) -> None:
    good: dict[Any, Any] = {
        multiple_choice: CHOICE,
        partial_scoring: {"context_options": ["a", "b"], "continuation": "c", "gold": 1},
        last_word: {"context": "a", "continuation": "b"},
    }
    lines(tmp_path / "set.jsonl", good[read], record)
    with pytest.raises(DataError, match=message):
        read(folder=str(tmp_path), file="set.jsonl")


def test_files_that_are_no_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*piqa.jsonl \(nor .gz, .bz2\)"):
        multiple_choice(folder=str(tmp_path), file="piqa.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl is empty"):
        multiple_choice(folder=str(tmp_path), file="empty.jsonl")
    (tmp_path / "text.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="line 1: broken JSON"):
        multiple_choice(folder=str(tmp_path), file="text.jsonl")
    (tmp_path / "repeated.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0, "gold": 1}\n')
    with pytest.raises(DataError, match="line 1: the key 'gold' is repeated"):
        multiple_choice(folder=str(tmp_path), file="repeated.jsonl")
    (tmp_path / "cut.txt.bz2").write_bytes(bz2.compress(b"a\n0\n" * 9000)[:-50])
    with pytest.raises(DataError, match="cannot read"):
        hellaswag_lines(folder=str(tmp_path), file="cut.txt")
    (tmp_path / "five.txt").write_text("context\n0\na\nb\nc\n")
    with pytest.raises(DataError, match="has 5 lines, not 6 an item"):
        hellaswag_lines(folder=str(tmp_path), file="five.txt")
    (tmp_path / "label.txt").write_text("context\n4\na\nb\nc\nd\n")
    with pytest.raises(DataError, match="line 2: expected the number of the right ending"):
        hellaswag_lines(folder=str(tmp_path), file="label.txt")


@pytest.mark.parametrize(
    ("read", "file", "num_items"),
    [
        (last_word, "lambada_openai.jsonl", 5153),
        (multiple_choice, "piqa.jsonl", 1838),
        (multiple_choice, "arc_easy.jsonl", 2376),
        (partial_scoring, "winogrande.jsonl", 1267),
        (hellaswag_lines, "hellaswag_val_full.txt", 10042),
    ],
)
def test_the_real_sets_are_read_whole(shared_data: Path, read: Any, file: str, num_items: int) -> None:
    assert len(read(folder=str(shared_data / "zero_shot"), file=file)["test"]) == num_items
