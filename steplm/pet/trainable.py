"""Selection of the trained parameters: sets ``requires_grad`` by name patterns."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from steplm.errors import PlanError


def apply_trainable(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Train exactly the parameters whose full name matches one of the shell-style patterns.

    A tied parameter is trained if any of its names matches, and is listed once, under its first name.

    Returns:
        The names of the trained parameters, in the model's order.

    Raises:
        PlanError: a pattern matches no parameter.
    """
    patterns = tuple(patterns)
    unused = set(patterns)
    trained: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        unused.difference_update(matching)
        if matching:
            trained.add(id(parameter))
    if unused:
        raise PlanError(
            f"{len(unused)} of the plan's {len(patterns)} trained patterns match no parameter of the model: "
            f"{', '.join(sorted(unused))}. The plan belongs to another model.",
            patterns=sorted(unused),
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return trainable_names(model)


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters with ``requires_grad``, in the model's order; tied ones once."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
