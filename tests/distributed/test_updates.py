"""Updates of sharded parameters: the same as of whole ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from steplm.config import DistributedConfig
from steplm.distributed.shard import as_global
from steplm.distributed.world import World, joined
from steplm.optim.adamw import AdamW
from steplm.optim.base import RuleBase
from steplm.optim.muon import Muon

RULES: dict[str, Callable[..., RuleBase]] = {"adamw": AdamW, "muon": Muon}
SHAPES = {"wide": (6, 512), "fewer rows than ranks": (1, 256), "tall": (256, 32), "short rows": (512, 4)}


def _tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _trained(make: Callable[..., RuleBase], place: Callable[[Tensor], Tensor]) -> RuleBase:
    """A rule after three steps with 8-bit states."""
    parameters = {name: nn.Parameter(place(tensor)) for name, tensor in _tensors(0).items()}
    rule = make(parameters, states="8bit")
    for step in range(1, 4):
        for name, gradient in _tensors(step).items():
            parameters[name].grad = place(gradient)
        rule.step(1e-2)
    return rule


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [2, 4])
def test_8_bit_states_of_shards_are_the_rows_of_those_of_whole_matrices(
    rule: str, size: int, run_ranks: Callable[..., None]
) -> None:
    whole = _trained(RULES[rule], lambda tensor: tensor)
    expected, weights = whole.state_dict()[0], {name: p.detach() for name, p in whole.parameters.items()}

    def action() -> None:
        with joined(DistributedConfig(world_size=size), torch.device("cpu")) as world:
            sharded = _trained(RULES[rule], lambda tensor: _rows_of(world, tensor))
        for key, state in sharded.state_dict()[0].items():
            assert torch.equal(state, world.rows.cut(expected[key])), key
        for name, parameter in sharded.parameters.items():
            rows = world.rows.cut(weights[name])
            torch.testing.assert_close(parameter.detach().to_local(), rows, rtol=1e-6, atol=1e-6)

    run_ranks(action, size)


def _rows_of(world: World, tensor: Tensor) -> Tensor:
    return as_global(world.rows.cut(tensor), world, len(tensor))
