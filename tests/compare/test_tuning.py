"""The chosen learning rate has the lowest loss; divergence is worse than any."""

from __future__ import annotations

import math

import pytest

from steplm.compare.tuning import Choice, choose


@pytest.mark.parametrize(
    ("losses", "choice"),
    [
        ({1.0: 3.0, 2.0: 2.5, 4.0: 2.8}, Choice(2.0, at_edge=False)),
        ({1.0: 2.4, 2.0: 2.5, 4.0: 2.8}, Choice(1.0, at_edge=True)),
        ({4.0: 2.3, 2.0: 2.5, 1.0: 2.8}, Choice(4.0, at_edge=True)),
        ({1.0: 3.0, 2.0: 2.5, 4.0: None}, Choice(2.0, at_edge=False)),
        ({1.0: 9.0, 2.0: math.nan, 4.0: None}, Choice(1.0, at_edge=True)),
        ({4.0: 2.5, 2.0: 2.5, 1.0: 2.5}, Choice(1.0, at_edge=True)),
        ({1.0: None, 2.0: math.inf}, None),
    ],
)
def test_the_lowest_finite_loss_is_chosen(losses: dict[float, float | None], choice: Choice | None) -> None:
    assert choose(losses) == choice
