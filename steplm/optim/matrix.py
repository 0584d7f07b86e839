"""Base class of update rules for whole matrices: the linear weights of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steplm.cost.formats import STATE_BLOCK, maps_at_once, row_pieces, scales_shape
from steplm.errors import ConfigError
from steplm.optim.base import MOMENT_DTYPES, CodeBooks, NamedParameters, RuleBase
from steplm.optim.masters import new_master, read_weight, write_weight
from steplm.optim.sharding import Sharding, sharding
from steplm.rows import on_this_rank

STATES = tuple(MOMENT_DTYPES)
MASTER_WEIGHTS = (True, False, "8bit")
UPDATE_RMS = 0.2  # of an update at learning rate 1, about AdamW's; Liu et al. (arXiv 2502.16982), section 2.2


class Map(NamedTuple):
    """One weight matrix: a matrix parameter, or one expert of a parameter of shape (num_experts, rows, columns)."""

    name: str
    expert: int

    def of(self, tensor: Tensor, rows: slice = slice(None)) -> Tensor:
        """This matrix, or some rows of it, in a tensor of the parameter's shape."""
        return (tensor if tensor.ndim == 2 else tensor[self.expert])[rows]


class MatrixRule(RuleBase):
    """Base class of rules that update a matrix as a whole. Subclasses implement ``_update_maps``.

    The arithmetic is in fp32 unless a subclass says otherwise. Matrices of one shape are updated together, at most
    ``STEP_CHUNK`` elements at once; a larger matrix is updated alone. Momentum and weights are read and written a few
    rows at a time; see ``row_pieces``. For a parameter that FSDP2 shards, weight, gradient and states are this rank's:
    rows of a matrix, or whole experts of a stack.

    Args:
        named_parameters: matrices (rows, columns), or stacks of them (num_experts, rows, columns), in bf16 or fp32.
        states: format of the momentum: ``fp32``, ``bf16`` (rounded to nearest), or ``8bit``: uint8 codes and one fp32
            scale per ``STATE_BLOCK`` elements of a matrix (see ``CodeBook``).
        master_weights: what is stored in addition to a bf16 weight. True: its fp32 value (4 bytes per parameter).
            ``8bit``: one byte with its rounding error; see ``steplm.optim.masters``. False: nothing; new weights are
            computed in fp32 and rounded stochastically, with bits from the device's default generator.
        weight_decay: decoupled, multiplied by the learning rate.
        momentum: coefficient of the old momentum in the new one; 0: no momentum, and no state for it.

    Raises:
        ConfigError: an unknown option, a parameter that is not a matrix, or a matrix sharded over ranks that this rule
            needs whole.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        states: str = "fp32",
        master_weights: bool | str = True,
        weight_decay: float = 0.1,
        momentum: float = 0.0,
        books: CodeBooks | None = None,
    ) -> None:
        super().__init__(weight_decay=weight_decay, books=books)
        if states not in STATES:
            raise ConfigError(f"no states {states!r}. Known: {', '.join(STATES)}.", states=states)
        if master_weights not in MASTER_WEIGHTS:
            known = ", ".join(map(str, MASTER_WEIGHTS))
            raise ConfigError(f"no master_weights {master_weights!r}. Known: {known}.", master_weights=master_weights)
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"momentum must be in [0, 1), not {momentum}.", momentum=momentum)
        self.states, self.master_weights, self.momentum = states, master_weights, momentum
        self.set_parameters(named_parameters)

    def _shards_rows(self) -> bool:
        """Whether the rule, with its options, supports matrices whose rows are sharded over ranks."""
        return True

    def _refuse_unless_matrix(self, name: str, parameter: Tensor) -> None:
        rule, shape = type(self).__name__, tuple(parameter.shape)
        if parameter.ndim not in (2, 3):
            raise ConfigError(
                f"{rule} updates matrices, and {name} has the shape {shape}. Leave it to AdamW.", name=name, shape=shape
            )
        if sharding(parameter) and not self._shards_rows():
            raise ConfigError(
                f"{rule} with these options needs whole matrices, and {name} is sharded over ranks. Replicate it, or "
                "leave it to AdamW.",
                name=name,
            )

    def _new_states(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        self._refuse_unless_matrix(name, parameter)
        weight, held = on_this_rank(parameter.detach()), dict[str, Tensor]()
        if self.momentum:
            shape = (*weight.shape[:-2], *scales_shape(weight.shape[-2:]))
            held = self._new_moment("momentum_buffer", weight, self.states, signed=True, shape=shape)
        return held | new_master(weight, self.master_weights)

    def _update(self, names: list[str], learning_rate: float, grad_scale: float) -> None:
        for maps in self._batches(names):
            self._update_maps(maps, learning_rate, grad_scale)

    def _update_maps(self, maps: list[Map], learning_rate: float, grad_scale: float) -> None:
        """Update matrices of one shape on one device."""
        raise NotImplementedError

    def _batches(self, names: list[str]) -> Iterator[list[Map]]:
        """The matrices of these parameters, in lists that are updated together."""
        alike: dict[tuple[torch.Size, torch.device, Sharding | None], list[Map]] = {}
        for name in names:
            parameter = self.parameters[name]
            if parameter.numel():
                maps = alike.setdefault((parameter.shape[-2:], parameter.device, sharding(parameter)), [])
                num_experts = 1 if parameter.ndim == 2 else len(on_this_rank(parameter))
                maps.extend(Map(name, expert) for expert in range(num_experts))
        for (shape, _, shared), maps in alike.items():
            num_shards = shared.num_shards if shared else 1
            size = num_shards * maps_at_once(-(-shape[0] // num_shards) * num_shards, shape[1])
            yield from (maps[start : start + size] for start in range(0, len(maps), size))

    def _gather(
        self,
        maps: list[Map],
        grad_scale: float,
        *,
        nesterov: bool,
        dtype: torch.dtype,
        shared: Sharding | None = None,
    ) -> Tensor:
        """Collect the gradients or, with momentum, update the momentum with them and collect that.

        Returns:
            A new tensor of shape (maps, rows, columns) with this rank's rows, zero-padded to the shape that
            ``Sharding.gather`` takes if ``shared``.
        """
        first = on_this_rank(self.parameters[maps[0].name].detach())
        num_rows, num_columns = first.shape[-2:]
        if shared:
            shape = shared.padded(len(maps), self.parameters[maps[0].name].shape)
            gathered = torch.zeros(shape, dtype=dtype, device=first.device)
        else:
            gathered = torch.empty((len(maps), num_rows, num_columns), dtype=dtype, device=first.device)
        for out, each in zip(gathered[: len(maps), :num_rows], maps, strict=True):
            gradient = self.parameters[each.name].grad
            assert gradient is not None
            if not self.momentum:
                out.copy_(each.of(on_this_rank(gradient))).mul_(grad_scale)
                continue
            for rows in row_pieces(*out.shape):
                state = self._momentum(each, rows)
                momentum = self._read_moment(*state, signed=True)
                update = each.of(on_this_rank(gradient), rows).to(torch.float32, copy=True).mul_(grad_scale)
                momentum.lerp_(update, 1.0 - self.momentum)
                if nesterov:
                    update.lerp_(momentum, self.momentum)
                out[rows].copy_(update if nesterov else momentum)
                del update  # rounding the momentum needs as much memory again
                self._write_moment(momentum, *state, signed=True)
        return gathered

    def _descend(self, maps: list[Map], updates: Tensor, learning_rate: float, factor: float) -> None:
        """Decay the weights, then subtract ``updates`` (maps, rows, columns) times the learning rate and ``factor``."""
        for update, each in zip(updates, maps, strict=True):
            for rows in row_pieces(*update.shape):
                states, part = self._states[each.name], partial(each.of, rows=rows)
                weight = part(on_this_rank(self.parameters[each.name].detach()))
                value = read_weight(weight, states, part)
                value.mul_(1.0 - learning_rate * self.weight_decay).add_(update[rows], alpha=-learning_rate * factor)
                write_weight(value, weight, states, part)

    def _momentum(self, each: Map, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Some rows of the momentum, which start at a block boundary, and the scales of 8-bit codes."""
        states = self._states[each.name]
        momentum, scales = each.of(states["momentum_buffer"], rows), states.get("momentum_buffer_scale")
        if scales is None:
            return momentum, None
        of_map = scales if self.parameters[each.name].ndim == 2 else scales[each.expert]
        first, last = (row * momentum.shape[1] / STATE_BLOCK for row in (rows.start, rows.stop))
        return momentum, of_map.view(-1)[int(first) : math.ceil(last)]
