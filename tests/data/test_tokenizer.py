"""Tokenizers: those trained here lose nothing, those read here agree with the libraries they come from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.data import tokenizer as tokenizer_module
from steplm.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    tokenizer_files,
    train_tokenizer,
    without_added_tokens,
)
from steplm.errors import ConfigError, DataError, HubUnavailable
from steplm.eval.text import opening_token
from steplm.models.folder import copy_companions

HARD_TEXTS = [
    "  two spaces first, and last  ",
    "tabs\tand\r\nlines\n\n\n",
    "é 語 🎉 \x00 \u200b a\u0301",
    "<s>markup</s> <unk> <|endoftext|>",
    "▁the SentencePiece space▁▁",
    " ",
    "\n",
]


@pytest.fixture(scope="module")
def trained() -> object:
    return train_tokenizer(["some text to learn from, some more text, and 12 numbers 345"] * 3, 280)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_a_trained_tokenizer_gives_every_text_back(trained: object, text: str) -> None:
    ids = trained.encode(text, add_special_tokens=False)
    assert trained.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


@settings(max_examples=100, deadline=None)
@given(st.binary())
def test_any_bytes_that_are_text_survive_training_and_encoding(trained: object, data: bytes) -> None:
    text = data.decode(errors="replace")
    assert trained.decode(trained.encode(text, add_special_tokens=False)) == text


def test_a_trained_tokenizer_has_one_special_token_and_no_more_than_it_may(texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 300)
    assert len(tokenizer) <= 300
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.all_special_ids == [0]
    assert tokenizer("plain").input_ids == tokenizer("plain", add_special_tokens=False).input_ids


def test_training_is_deterministic_whatever_the_threads(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys; from steplm.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer(json.load(open(sys.argv[1])), 320).backend_tokenizer.to_str())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
    alone = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert alone.stdout.strip() == train_tokenizer(texts, 320).backend_tokenizer.to_str()


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=256 is too small.*take 257"):
        train_tokenizer(["text"], 256)
    assert len(train_tokenizer(["text"], 257)) == 257


def test_saved_and_loaded_it_is_the_same_also_for_automodel_users(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The configuration of a Llama model beside it must not turn it into a Llama tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path / "export"
    shutil.copytree(tokenizer_dir, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in HARD_TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.eos_token_id == theirs.eos_token_id == 0


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_sentencepiece_ids_are_those_of_the_sentencepiece_library(shared_data: Path, name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = shared_data / "tokenizers" / "mistral-v1" / "tokenizer.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = load_tokenizer(file.parent / name)
    assert len(tokenizer) == reference.get_piece_size() == 32000
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (reference.bos_id(), reference.eos_id())
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    real = (shared_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")[:200_000]
    for text in [*HARD_TEXTS, real]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text)
        assert backend.decode(ids, skip_special_tokens=False) == reference.decode(ids)


def test_a_sentencepiece_tokenizer_saved_as_a_folder_stays_the_same(shared_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(shared_data / "tokenizers" / "mistral-v1")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert [again(text).input_ids for text in HARD_TEXTS] == [tokenizer(text).input_ids for text in HARD_TEXTS]


@pytest.fixture
def mistral(shared_data: Path, tmp_path: Path) -> Path:
    """A folder with ``tokenizer.model`` alone, as LLaMA 1, 2 and Mistral 7B were published."""
    shutil.copy(shared_data / "tokenizers/mistral-v1/tokenizer.model", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "begins", "ends"),
    [
        (None, True, False),
        ({}, True, False),
        ({"add_bos_token": True, "add_eos_token": False}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_a_text_begins_and_ends_as_the_files_beside_a_sentencepiece_model_say(
    mistral: Path, given: dict[str, bool] | None, begins: bool, ends: bool
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import AutoTokenizer

    reference = sentencepiece.SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
    if given is not None:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "LlamaTokenizer", **names, **given}
        (mistral / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(mistral)
    for text in ("hello world", "", "  two  spaces ", "tabs\tand\nlines", "é 語 🎉", "1,234.5"):
        assert tokenizer(text).input_ids == reference.encode(text, add_bos=begins, add_eos=ends)
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)
    if given:  # where nothing is said, transformers 5 forgets the BOS that its own LlamaTokenizer documents
        theirs = AutoTokenizer.from_pretrained(mistral)
        assert tokenizer("hello world").input_ids == theirs("hello world").input_ids
    assert opening_token(tokenizer) == (reference.bos_id() if begins else reference.eos_id())


def test_added_tokens_and_the_chat_template_beside_a_sentencepiece_model_are_read(mistral: Path) -> None:
    added = {"32000": {"content": "<|im_end|>", "special": True, "normalized": False}}
    config = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}", "added_tokens_decoder": added}
    (mistral / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(mistral)
    assert (tokenizer.eos_token_id, len(tokenizer), tokenizer.bos_token) == (32_000, 32_001, "<s>")
    assert tokenizer("hello<|im_end|>").input_ids[-1] == 32_000
    assert tokenizer.chat_template == "{{ messages }}"
    assert [file.name for file in tokenizer_files(mistral)] == ["tokenizer.model", "tokenizer_config.json"]


def test_a_copy_gives_the_ids_of_its_original(mistral: Path, tmp_path: Path) -> None:
    """As ``steplm grow`` copies it, and as ``transformers`` saves it."""
    before = load_tokenizer(mistral)
    (tmp_path / "copied").mkdir()
    copy_companions(mistral, tmp_path / "copied")
    before.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "copied", tmp_path / "saved"):
        after = load_tokenizer(folder)
        assert [after(text).input_ids for text in HARD_TEXTS] == [before(text).input_ids for text in HARD_TEXTS]


@pytest.mark.parametrize("name", ["", "encoder.json", "vocab.bpe"])
def test_the_gpt2_vocabulary_gives_known_ids(shared_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt2" / name)
    assert len(tokenizer) == 50257
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert tokenizer.eos_token_id == 50256
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_a_single_json_file_under_any_name_is_read(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    shutil.copy(tokenizer_dir / "tokenizer.json", file)
    tokenizer = load_tokenizer(file)
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer("growth").input_ids == load_tokenizer(tokenizer_dir)("growth").input_ids
    assert tokenizer_files(file) == [file]


def test_the_files_of_a_folder_are_those_that_are_read(tokenizer_dir: Path) -> None:
    assert [file.name for file in tokenizer_files(tokenizer_dir)] == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert tokenizer_files("owner/name") == []


def test_a_folder_without_a_tokenizer_tells_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no tokenizer at .*tokenizer\.json; tokenizer\.model; encoder\.json and vocab"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("data", [b"", b"{}", b"\x00\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name if name.endswith("model") else "tokenizer"):
        load_tokenizer(tmp_path)


def test_a_truncated_sentencepiece_model_is_refused(shared_data: Path, tmp_path: Path) -> None:
    data = (shared_data / "tokenizers" / "mistral-v1" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


def test_a_hub_name_without_network_is_unavailable() -> None:
    with pytest.raises(HubUnavailable, match=r"no folder 'owner/name'.*\n.*'train' to train one here"):
        load_tokenizer("owner/name")


def test_a_missing_path_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        load_tokenizer(tmp_path / "nothing")
    assert not isinstance(caught.value, HubUnavailable)


def with_bos(tokenizer: object) -> object:
    """A tokenizer that puts BOS before a text, as LLaMA's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer


def test_a_tokenizer_stripped_of_its_bos_adds_none_however_it_is_loaded(texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    before = with_bos(train_tokenizer(texts, 300))
    plain_ids = before(texts[0], add_special_tokens=False).input_ids
    assert before(texts[0]).input_ids == [before.bos_token_id, *plain_ids]
    without_added_tokens(before).save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)  # a family whose own tokenizer class puts BOS first
    for after in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert after(texts[0]).input_ids == plain_ids
        assert (after.bos_token, after.eos_token) == (END_OF_TEXT, END_OF_TEXT)
        assert after.get_vocab() == before.get_vocab()
        assert after.decode(plain_ids) == texts[0]
    assert before(texts[0]).input_ids[0] == before.bos_token_id  # the given one is left as it was


def test_a_tokenizer_of_the_llama_family_is_stripped_too(texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "ab": 7}
    family = LlamaTokenizerFast(vocab=vocabulary, merges=[("▁", "a"), ("a", "b")], add_bos_token=True)
    plain_ids = family("ab a", add_special_tokens=False).input_ids
    assert family("ab a").input_ids == [1, *plain_ids]
    without_added_tokens(family).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab a").input_ids == plain_ids
    assert load_tokenizer(tmp_path)("ab a").input_ids == plain_ids


def test_a_panic_of_the_tokenizers_library_is_an_unusable_tokenizer(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As of pyo3: no ``Exception``."""

    def read(*files: Path) -> None:
        raise Panic("range end index 46 out of range")

    monkeypatch.setitem(tokenizer_module.FORMATS, ("tokenizer.json",), read)
    with pytest.raises(DataError, match="range end index 46"):
        load_tokenizer(tokenizer_dir)


def test_a_tokenizer_stripped_of_its_bos_keeps_its_chat_template(texts: list[str]) -> None:
    before = train_tokenizer(texts, 300)
    before.chat_template = "{{ messages }}"
    assert without_added_tokens(before).chat_template == "{{ messages }}"
