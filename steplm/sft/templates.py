"""Chat templates: the tokenizer's own, a file's, or Alpaca's for a model that has none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steplm.errors import ConfigError
from steplm.files import is_file
from steplm.units import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INPUT_HEADING = "\n\n### Input:\n"

# Alpaca's prompt, for one turn or several (https://github.com/tatsu-lab/stanford_alpaca). A system message stands in
# place of its first sentences. An input is a part of the user's message, under its heading: plain messages say all that
# Alpaca's records say. BOS where the tokenizer has one, which is what such a model has seen before a text.
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
    """A user's message of Alpaca's two parts; the template knows the second by its heading."""
    return f"{instruction}{INPUT_HEADING}{text}" if text else instruction


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> str:
    """Give the tokenizer the template of ``choice``; what it is, in words.

    Args:
        choice: a file, ``alpaca``, ``none`` (the tokenizer stays as it is); None: the tokenizer's own, else Alpaca's.

    Raises:
        ConfigError: no such file, or no template in it.
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
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it can fail in any way
        raise ConfigError(f"chat_template: {choice} makes no prompt: {reason(error)}", path=choice) from None
    return path.name


def template_file(choice: str) -> Path:
    """The Jinja file of a ``choice`` that is neither ``alpaca`` nor ``none``.

    Raises:
        ConfigError: no such file.
    """
    path = Path(choice).expanduser()
    if not is_file(path):
        raise ConfigError(f"chat_template: no file {choice}; give a Jinja file, alpaca or none", path=choice)
    return path
