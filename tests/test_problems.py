from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, WithJsonSchema

from steplm.errors import ConfigError
from steplm.problems import validated

Auto = WithJsonSchema({"anyOf": [{"type": "integer"}, {"enum": ["auto"]}]})


class Sized(BaseModel):
    kind: Annotated[Literal["one", "two"], WithJsonSchema({"enum": ["auto", "one", "two"]})] = "one"
    size: Annotated[int, Auto] = 1


class Whole(BaseModel):
    part: Sized


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "twi"}, "part.kind: Input should be 'auto', 'one' or 'two' (got 'twi'). Did you mean 'two'?"),
        ({"kind": "aut"}, "part.kind: Input should be 'auto', 'one' or 'two' (got 'aut'). Did you mean 'auto'?"),
        ({"size": []}, "part.size: Input should be a valid integer, or 'auto' (got [])"),
    ],
)
def test_auto_is_named_where_it_is_accepted(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validated(Whole, {"part": value})
    assert str(error.value) == message


class Several(BaseModel):
    seeds: Annotated[list[int], Field(min_length=1)]


def test_an_empty_list_where_a_value_is_needed_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match=r"^seeds: is empty, but needs at least 1 value \(got \[\]\)$"):
        validated(Several, {"seeds": []})
