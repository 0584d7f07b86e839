"""Chat templates: the tokenizer's own, one from a file, or Alpaca's for a model that has none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from steplm.errors import ConfigError
from steplm.units import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INPUT_HEADING = "\n\n### Input:\n"

# Alpaca's prompt, for one or more turns (https://github.com/tatsu-lab/stanford_alpaca). A system message replaces its
# first sentences. The input is part of the user message, under its heading, so that plain messages can express any
# Alpaca record. The prompt begins with BOS if the tokenizer has one, because such a model has seen it before a text.
ALPACA_TEMPLATE = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else none -%}
{%- set turns = messages if system is none else messages[1:] -%}
{{- bos_token | default('', true) -}}
{%- if system is not none -%}
    {{- system -}}
{%- elif '\n\n### Input:\n' in turns[0].content -%}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
    {{- 'Write a response that appropriately completes the request.' -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- '\n\n### Instruction:\n' + message.content + '\n\n### Response:' -}}
    {%- elif message.role == 'assistant' -%}
        {{- message.content + eos_token -}}
    {%- else -%}
        {{- raise_exception('after a first system message only user and assistant speak, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
""".strip()


def with_input(instruction: str, text: str) -> str:
    """Join Alpaca's instruction and input in one user message; the template finds the input by its heading."""
    return f"{instruction}{INPUT_HEADING}{text}" if text else instruction


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> str:
    """Set the tokenizer's chat template, and return a description of it.

    Args:
        choice: a file, ``alpaca``, or ``none`` (changes nothing); default: the tokenizer's own, else Alpaca's.

    Raises:
        ConfigError: the file does not exist, or does not hold a working template.
    """
    if choice == "none":
        return "none: prompts and completions as they stand"
    if choice is None and tokenizer.chat_template is not None:
        return "the tokenizer's own"
    if choice is None or choice == "alpaca":
        tokenizer.chat_template = ALPACA_TEMPLATE
        return "alpaca"
    path = template_file(choice)
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8-sig")
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program and can raise anything
        raise ConfigError(f"chat_template: {choice} makes no prompt: {reason(error)}", path=choice) from None
    return path.name


def template_file(choice: str) -> Path:
    """The Jinja file of a ``choice`` that is neither ``alpaca`` nor ``none``.

    Raises:
        ConfigError: the file does not exist.
    """
    path = Path(choice).expanduser()
    if not os.path.isfile(path):
        raise ConfigError(f"chat_template: no file {choice}; give a Jinja file, alpaca or none", path=choice)
    return path
