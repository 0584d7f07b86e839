"""``steplm init``: a starter YAML with every key, generated from the configuration classes so that it stays correct."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from steplm.config import RunConfig
from steplm.errors import ConfigError

# The keys that a first run sets; all others appear in the file as comments, with their defaults.
STARTER: dict[str, Any] = {
    "name": "my-run",
    "method": "auto",
    "model.hidden_size": 512,
    "model.intermediate_size": 1376,
    "model.num_hidden_layers": 12,
    "model.num_attention_heads": 8,
    "model.vocab_size": 16384,
    "data.train": ["builtin://python-docs"],
    "data.tokenizer": "train",
    "plan.total_tokens": "20M",
    "optim.learning_rate": "auto",
    "train.precision": "bf16",
    "train.sequence_length": 512,
    "train.per_device_train_batch_size": 8,
}


def write_starter(path: Path, *, force: bool = False) -> None:
    """Write the starter file.

    Raises:
        ConfigError: the file exists and ``force`` is not set.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} exists: name another file, or pass --force to replace it", path=str(path))
    path.write_text(starter_text())
    print(f"wrote {path}. Next: steplm plan {path}, then steplm train {path}")


def starter_text() -> str:
    """The text of the starter file, which ``load_config`` accepts unchanged."""
    lines = ["# A run of steplm. Commented keys show their defaults. Check it with: steplm plan FILE", ""]
    sections = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            sections += ["", f"# {(section.__doc__ or '').strip()}", f"{name}:"]
            sections += [_line(f"{name}.{key}", key, inner, "  ") for key, inner in section.model_fields.items()]
        else:
            lines.append(_line(name, name, field, ""))
    return "\n".join(lines + sections) + "\n"


def _line(path: str, key: str, field: FieldInfo, indent: str) -> str:
    value = STARTER.get(path, field.get_default(call_default_factory=True))
    text = value if isinstance(value, str) else json.dumps(value)
    entry = f"{indent}{'' if path in STARTER else '# '}{key}: {text}"
    told = field.description or ""
    choices = _choices(field.annotation)
    if not all(choice in told for choice in choices):
        told = "; ".join(filter(None, (told, f"choices: {', '.join(choices)}")))
    first, *more = textwrap.wrap(told, 68, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join([f"{entry:<48}  # {first}" if first else entry, *(f"{'':<48}  # {line}" for line in more)])


def _choices(annotation: Any) -> list[str]:
    """The words that a value may be, in the order of the type; none if it may only be a number, a text or a flag."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    words = [word for part in get_args(annotation) for word in _choices(part)]
    return ["true", "false", *words] if words and bool in get_args(annotation) else words
