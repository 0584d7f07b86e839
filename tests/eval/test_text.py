"""How texts become the stream that is scored."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from steplm.data.tokenizer import load_tokenizer
from steplm.errors import DataError
from steplm.eval.text import token_stream


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


def write_records(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_one_end_token_stands_before_everything_and_after_each_document(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    entry = write_records(tmp_path / "a.jsonl", ["The model", "grows."])
    eos = tokenizer.eos_token_id
    expected = [eos, *tokenizer("The model").input_ids, eos, *tokenizer("grows.").input_ids, eos]
    assert token_stream([entry], tokenizer).token_ids.tolist() == expected


def test_a_tokenizer_that_puts_bos_before_a_text_begins_the_stream_with_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    entry = write_records(tmp_path / "a.jsonl", ["one", "two"])
    token_ids = token_stream([entry], tokenizer).token_ids.tolist()
    assert token_ids[0] == bos
    assert token_ids.count(bos) == 1


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.test.tokens.gz", "book.txt"])
def test_a_text_file_is_one_document_however_long(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    text = " \n = Title = \n \n" + " A line of the text , in WikiText's layout . \n \n" * 3000  # 140 kB
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    stream = token_stream([str(path)], tokenizer)
    assert stream.token_ids.tolist().count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(stream.token_ids[1:-1]) == text
    assert stream.num_text_bytes == len(text.encode())


def test_max_tokens_cuts_tokens_and_bytes_at_the_same_place(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = ["New layers — new.", "Old layers — old."]
    entry = write_records(tmp_path / "a.jsonl", texts)
    whole = token_stream([entry], tokenizer)
    for max_tokens in range(1, len(whole.token_ids) + 3):
        stream = token_stream([entry], tokenizer, max_tokens=max_tokens)
        expected = whole.token_ids[: max_tokens + 1]
        while "\ufffd" in (text := tokenizer.decode(expected, skip_special_tokens=True)):
            expected = expected[:-1]  # up to a whole character
        assert stream.token_ids.tolist() == expected.tolist()
        assert stream.token_ids.itemsize == 4
        assert stream.num_text_bytes == len(text.encode())


def test_a_text_that_spells_the_end_token_does_not_end_itself(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    entry = write_records(tmp_path / "a.jsonl", [f"say {tokenizer.eos_token} twice"])
    assert token_stream([entry], tokenizer).token_ids.tolist().count(tokenizer.eos_token_id) == 2


def test_no_text_is_an_error_that_names_the_field(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    entry = write_records(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(DataError, match=r"(?s)no text in .*no field 'body'"):
        token_stream([entry], tokenizer, text_field="body")


def test_wikitext_is_read_whole(tokenizer: PreTrainedTokenizerFast, shared_data: Path) -> None:
    path = shared_data / "wikitext-2" / "wiki.test.raw"
    stream = token_stream([str(path)], tokenizer)
    assert stream.num_text_bytes == pytest.approx(path.stat().st_size, abs=4)  # blank lines at the end may go
    assert stream.token_ids.tolist().count(tokenizer.eos_token_id) == 2
