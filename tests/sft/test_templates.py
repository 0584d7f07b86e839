"""Alpaca's template: its text, its tokens, and what stands around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steplm.errors import ConfigError
from steplm.sft.records import as_conversation
from steplm.sft.templates import ALPACA_TEMPLATE, set_chat_template

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
END = "<|endoftext|>"


@pytest.fixture
def alpaca(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    assert set_chat_template(tokenizer, None) == "alpaca"
    return tokenizer


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Say cat.", "input": "", "output": "cat"}, WITHOUT_INPUT),
        ({"instruction": "Say cat.", "output": "(cat)"}, WITHOUT_INPUT),
        ({"instruction": "Repeat.", "input": "a cat\n\na dog", "output": "a cat"}, WITH_INPUT),
    ],
)
def test_a_record_by_the_template_is_alpacas_text_and_its_tokens(
    alpaca: PreTrainedTokenizerFast, record: dict[str, str], prompt: str
) -> None:
    messages = [dict(message) for message in as_conversation(record).messages]
    text = END + prompt.format(**record) + record["output"] + END
    assert alpaca.apply_chat_template(messages, tokenize=False) == text
    expected = alpaca(text, add_special_tokens=False).input_ids
    assert alpaca.apply_chat_template(messages, return_dict=True)["input_ids"] == expected
    asked = alpaca.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == END + prompt.format(**record)


def test_later_turns_follow_and_a_system_message_stands_in_place_of_the_first_sentences(
    alpaca: PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say cat."},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "And dog."},
    ]
    assert alpaca.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        f"{END}Be brief.\n\n### Instruction:\nSay cat.\n\n### Response:cat{END}"
        "\n\n### Instruction:\nAnd dog.\n\n### Response:"
    )


def test_a_tokenizer_without_bos_begins_with_the_text(alpaca: PreTrainedTokenizerFast) -> None:
    alpaca.bos_token = None
    asked = alpaca.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert asked == WITHOUT_INPUT.format(instruction="?")


def test_another_role_is_refused_with_its_name(alpaca: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="not tool"):
        alpaca.apply_chat_template([{"role": "tool", "content": "3"}], tokenize=False)


def test_the_template_is_saved_with_the_tokenizer(alpaca: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    alpaca.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == ALPACA_TEMPLATE


def test_the_tokenizers_own_template_is_kept_unless_another_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    file = tmp_path / "other.jinja"
    file.write_text("\ufeffQ: {{ messages[0].content }} A:")  # the byte order mark of some editors
    assert set_chat_template(tokenizer, str(file)) == "other.jinja"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "Q: x A:"
    set_chat_template(tokenizer, "alpaca")
    assert tokenizer.chat_template == ALPACA_TEMPLATE


@pytest.mark.parametrize("text", [None, "{% for message in", "{{ messages.nothing.here }}"])
def test_a_template_that_is_none_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "broken.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.jinja"):
        set_chat_template(tokenizer, str(file))
