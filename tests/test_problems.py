from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from steplm.errors import ConfigError
from steplm.problems import validated


class Several(BaseModel):
    seeds: Annotated[list[int], Field(min_length=1)]


def test_an_empty_list_where_a_value_is_needed_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match=r"^seeds: is empty, but needs at least 1 value \(got \[\]\)$"):
        validated(Several, {"seeds": []})
