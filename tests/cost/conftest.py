"""Phases made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest

from steplm.schedule import Entry, Phase, Role, Trained


@pytest.fixture(scope="session")
def make_phase() -> Callable[..., Phase]:
    """``make_phase(layers, outside)``: a first phase with these roles, from bottom to top.

    Layers as roles one by one, or as a mapping from role to number of layers, the first at the bottom.
    """

    def make(layers: Iterable[Role] | Mapping[Role, int], outside: Role | None = None) -> Phase:
        if isinstance(layers, Mapping):
            layers = (role for role, count in layers.items() for _ in range(count))
        return Phase(1, 1, Entry("fresh"), tuple(layers), Trained() if outside is None else outside, 0, 0, 0)

    return make
