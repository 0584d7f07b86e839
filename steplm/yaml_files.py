"""Read and write YAML as people write it, so that every value survives a round trip."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from steplm.errors import ConfigError
from steplm.units import reason, shortened

MOST_YAML_VALUES = 100_000
_UNWRITABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class YamlLoader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number and refuses duplicate keys.

    PyYAML follows YAML 1.1, which requires ``1.0e-5``, and keeps the last of duplicate keys.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # PyYAML's stubs are wrong
        # Not in construct_mapping, where "<<" has already merged in the keys of other mappings.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"the key {shortened(key.value)} appears twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return node


class YamlDumper(yaml.SafeDumper):
    """Quotes the text ``1e-5``, which would otherwise be read as a number."""


for _reader_or_writer in (YamlLoader, YamlDumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Parse YAML into mappings with text keys, lists, text, numbers, booleans and null.

    Raises:
        yaml.YAMLError: the text is not valid YAML, or contains other types.
    """
    try:
        value = yaml.load(text, Loader=YamlLoader)  # a SafeLoader
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML leaks internal errors, such as a KeyError for "!!bool maybe"
        raise yaml.YAMLError(f"a value that cannot be read ({type(error).__name__}: {error})") from None
    _require_plain(value)
    return value


def _require_plain(value: Any) -> None:
    """Refuse values that would not survive a round trip, and huge or cyclic structures built with aliases."""
    waiting, num_values = [value], 0
    while waiting:
        value = waiting.pop()
        num_values += 1
        if num_values > MOST_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MOST_YAML_VALUES:,} values, or one that contains itself")
        if isinstance(value, dict):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise yaml.YAMLError(f"the key {shortened(odd[0])} is not text: quote it")
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            if not value.isprintable() and _UNWRITABLE.search(value):
                raise yaml.YAMLError(f"the text {shortened(value)} has a character that does not come back from a file")
        elif isinstance(value, float) and math.isnan(value):
            raise yaml.YAMLError("not a number: .nan")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise yaml.YAMLError(f"a number of {value.bit_length()} bits; 64 with the sign are the most")
        elif not isinstance(value, float | int | None):
            raise yaml.YAMLError(f"the {type(value).__name__} {shortened(value)}: quote it if it is text")


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Dump to YAML that ``read_yaml`` reads back to the same values."""
    return yaml.dump(values, Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a file, with environment variables expanded.

    Raises:
        ConfigError: the file is missing, is not valid YAML, does not contain a mapping, or uses an unset variable.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}", path=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", path=str(path)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not sections with keys.", path=str(path))
    return with_environment(values, path)


def _one_line(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark and problem else reason(error)


def with_environment(value: Any, path: Path | str) -> Any:
    """Expand ``${NAME}`` and ``${NAME:-default}`` in every string within a value.

    Args:
        path: how messages refer to the source.

    Raises:
        ConfigError: a variable is not set and has no default.
    """

    def replacement(match: re.Match[str]) -> str:
        name, default = match.groups()
        text = os.environ.get(name, default)
        if text is None:
            raise ConfigError(
                f"{path} uses ${{{name}}}, but the environment variable {name} is not set.", variable=name
            )
        return text

    if isinstance(value, dict):
        return {key: with_environment(child, path) for key, child in value.items()}
    if isinstance(value, list):
        return [with_environment(child, path) for child in value]
    return _VARIABLE.sub(replacement, value) if isinstance(value, str) else value


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply an override ``section.key=value`` to ``values``; the value is parsed as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"cannot read the override {override!r}: expected section.key=value", override=override)
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    *sections, name = key.split(".")
    target = values
    for section in sections:
        child = target.get(section)
        target[section] = dict(child) if isinstance(child, Mapping) else {}
        target = target[section]
    target[name] = value
