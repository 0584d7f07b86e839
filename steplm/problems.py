"""Validation errors: report every problem at once, with its key path and the closest known name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError, WithJsonSchema

from steplm.errors import ConfigError
from steplm.units import nearest, shortened

S = TypeVar("S", bound=BaseModel)
MOST_PROBLEMS = 20  # in one message


def validated(section: type[S], values: Mapping[str, Any], whole: str = "the configuration") -> S:
    """Build ``section`` from ``values``.

    Args:
        whole: how messages refer to the values as a whole.

    Raises:
        ConfigError: lists all problems, each with its path and, for unknown keys, the closest known key.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigError(listing(_explained(problems, section, whole), whole), errors=problems) from None


def listing(problems: Iterable[str], whole: str) -> str:
    """One problem as is; of several, the first few, one per line and without duplicates."""
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return unique[0]
    lines = [f"  - {line}" for line in unique[:MOST_PROBLEMS]]
    if len(unique) > MOST_PROBLEMS:
        lines.append(f"  … and {len(unique) - MOST_PROBLEMS} more")
    return "\n".join([f"{len(unique)} problems in {whole}:", *lines])


def sections_of(root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The keys that contain a section or a list of sections, with the type of the section."""
    sections = {name: next(_sections_in(field.annotation), None) for name, field in root.model_fields.items()}
    return {name: section for name, section in sections.items() if section is not None}


def keys_of(root: type[BaseModel]) -> list[str]:
    """Every key of the root and of its sections, as ``section.key``."""
    sections, keys = sections_of(root), list[str]()
    for name in root.model_fields:
        keys += [f"{name}.{key}" for key in sections[name].model_fields] if name in sections else [name]
    return keys


def _explained(problems: Iterable[Mapping[str, Any]], root: type[BaseModel], whole: str) -> list[str]:
    """One line per unknown key and per place; a union has one problem for each of its types."""
    unknown, others = list[str](), dict[str, list[Mapping[str, Any]]]()
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            unknown.append(_unknown_key(problem["loc"], root, whole))
        else:
            path = list(_keys(problem["loc"], root))
            others.setdefault(".".join(path), []).append(_with_auto(problem, path, root))
    return unknown + [_line(where, at_place) for where, at_place in others.items()]


def _with_auto(problem: Mapping[str, Any], path: Sequence[str], root: type[BaseModel]) -> Mapping[str, Any]:
    """The problem with the accepted value ``auto``, which is resolved before validation and so unknown to pydantic."""
    section = sections_of(root).get(path[0], root) if len(path) > 1 else root
    field = section.model_fields.get(path[-1]) if path else None
    schemas = [part.json_schema or {} for part in field.metadata if isinstance(part, WithJsonSchema)] if field else []
    if not any("auto" in branch.get("enum", ()) for schema in schemas for branch in (schema, *schema.get("anyOf", ()))):
        return problem
    if problem["type"] != "literal_error":
        return {**problem, "or_auto": True}
    expected = f"'auto', {problem['ctx']['expected']}"
    return {**problem, "msg": f"Input should be {expected}", "ctx": {"expected": expected}}


def _line(where: str, problems: Sequence[Mapping[str, Any]]) -> str:
    message = ", or: ".join(dict.fromkeys(map(_message, problems)))
    message += ", or 'auto'" * any("or_auto" in problem for problem in problems)
    if not where:
        return message
    value = problems[0]["input"]
    given = "" if isinstance(value, dict) else f" (got {shortened(value)})"
    return f"{where}: {message}{given}{''.join(dict.fromkeys(map(_nearest_choice, problems)))}"


def _message(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "too_short" and not problem["input"]:
        return f"is empty, but needs at least {problem['ctx']['min_length']} value"
    return str(problem["msg"].removeprefix("Value error, "))


def _keys(place: Iterable[str | int], root: type[BaseModel]) -> Iterator[str]:
    """Yield the keys and indices that lead to a place, without the names that pydantic adds for union branches."""
    section: type[BaseModel] | None = root
    is_mapping = False
    for part in place:
        if isinstance(part, int):
            yield str(part)
        elif section is not None or is_mapping:
            yield part
            if section is not None and part in section.model_fields:
                is_mapping = get_origin(section.model_fields[part].annotation) is dict
                section = sections_of(section).get(part)


def _unknown_key(place: Iterable[str | int], root: type[BaseModel], whole: str) -> str:
    *path, name = place
    section = root
    for part in path:
        section = sections_of(section).get(str(part), section)
    elsewhere = [key for key in keys_of(root) if key.endswith(f".{name}")]
    known = f" Did you mean {elsewhere[0]!r}?" if elsewhere else f" Known keys: {', '.join(section.model_fields)}."
    owner = ".".join(map(str, path)) or whole
    return f"{owner} has no key {shortened(name)}.{nearest(str(name), section.model_fields, otherwise=known)}"


def _nearest_choice(problem: Mapping[str, Any]) -> str:
    if problem["type"] != "literal_error":
        return ""
    choices = re.findall(r"'(\w+)'", problem["ctx"]["expected"])
    hint = nearest(str(problem["input"]), choices, otherwise="")
    return f".{hint}" if hint else ""


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
