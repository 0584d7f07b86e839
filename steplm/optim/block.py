"""BAdam: Adam on one layer at a time. A layer has gradients, moments and a master weight only while it is its turn."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from steplm.errors import ConfigError
from steplm.optim.adamw import AdamW, GradNorm


def active_block(step: int, *, num_blocks: int, seed: int, switch_steps: int) -> int:
    """Which of ``num_blocks`` blocks the optimizer step ``step`` (from 0) trains.

    Each block has ``switch_steps`` steps in a row, and each comes once in a pass over all of them; every pass has
    an order of its own, drawn from ``seed`` and the number of the pass.
    """
    turn = step // switch_steps
    order = list(range(num_blocks))
    random.Random(f"{seed}:{turn // num_blocks}").shuffle(order)
    return order[turn % num_blocks]


class BlockAdamW:
    """BAdam (Luo, Yu and Li, arXiv 2404.02827): ``AdamW`` on one decoder layer after the other, a layer a block.

    Only the active layer has ``requires_grad``, and so gradients; its moments, and the fp32 master of bf16 weights,
    begin anew when its turn begins and are gone when it ends. Parameters outside the layers are trained all the
    time, with states that last. The interface is that of ``AdamW``; the layer changes at the end of the step before
    its turn, the old one's gradients and states being freed first. What is left of a turn is its weight, which is
    the master rounded.

    Args:
        named_parameters: all that shall be trained, by name. ``requires_grad`` of those in layers is set here.
        layer_prefix: name of the list of layers, such as ``model.layers``.
        seed: of the order of the layers; see ``active_block``.
        switch_steps: optimizer steps of a layer's turn.
        step: optimizer steps done before, where a run goes on; then ``load_state_dict`` gives back their states.
        betas, eps, weight_decay, states, master_weights: as for ``AdamW``.

    Raises:
        ConfigError: ``switch_steps`` is less than 1, no parameter is in a layer, or as ``AdamW``.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        *,
        layer_prefix: str,
        seed: int,
        switch_steps: int = 100,
        step: int = 0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        states: str = "fp32",
        master_weights: bool = True,
    ) -> None:
        if switch_steps < 1:
            raise ConfigError(
                f"a layer's turn cannot be {switch_steps} steps long: set optim.switch_steps to 1 or more.",
                switch_steps=switch_steps,
            )
        self.parameters: dict[str, nn.Parameter] = dict(named_parameters)
        self._blocks = _by_layer(self.parameters, layer_prefix)
        if not self._blocks:
            raise ConfigError(
                f"none of the {len(self.parameters)} trained parameters is in a layer of {layer_prefix!r}, and BAdam "
                "trains one layer after the other. Use optim.name=adamw.",
                layer_prefix=layer_prefix,
            )
        self._seed, self._switch_steps, self._steps_done = seed, switch_steps, step
        self._adamw = partial(
            AdamW, betas=betas, eps=eps, weight_decay=weight_decay, states=states, master_weights=master_weights
        )
        in_layers = {name for block in self._blocks.values() for name in block}
        self._outer = self._adamw({name: p for name, p in self.parameters.items() if name not in in_layers})
        self._block = self._adamw({})
        self._activate()

    @property
    def active_layer(self) -> int:
        """Index of the layer that the next step trains."""
        index = active_block(
            self._steps_done, num_blocks=len(self._blocks), seed=self._seed, switch_steps=self._switch_steps
        )
        return list(self._blocks)[index]

    @property
    def steps(self) -> dict[str, int]:
        """Updates since its states were made, of every parameter that has states."""
        return self._outer.steps | self._block.steps

    def step(self, learning_rate: float, grad_scale: float = 1.0) -> None:
        """As ``AdamW.step``; at the end of a turn the next layer becomes active."""
        self._outer.step(learning_rate, grad_scale)
        self._block.step(learning_rate, grad_scale)
        self._advance()

    @contextmanager
    def in_backward(self, learning_rate: float | None) -> Iterator[GradNorm]:
        """As ``AdamW.in_backward``. The norm is complete, and the layer changes, where the block ends."""
        norm = GradNorm(next(iter(self.parameters.values())).device)
        with self._outer.in_backward(learning_rate) as outer, self._block.in_backward(learning_rate) as block:
            yield norm
        norm.add(outer.total())
        norm.add(block.total())
        if learning_rate is not None:
            self._advance()

    def zero_grad(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """As ``AdamW.state_tensors``, of the parameters that have states now."""
        return self._outer.state_tensors() | self._block.state_tensors()

    def tables(self) -> list[Tensor]:
        """As ``AdamW.tables``."""
        return self._outer.tables() + self._block.tables()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """As ``AdamW.state_dict``, of the parameters that have states now."""
        outer, outer_steps = self._outer.state_dict()
        block, block_steps = self._block.state_dict()
        return outer | block, outer_steps | block_steps

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int], *, strict: bool = True) -> None:
        """Copy saved states in, exactly.

        Args:
            tensors, steps: what ``state_dict`` gave after as many steps as this optimizer was made with.
            strict: as for ``AdamW``. If not, the states of layers are passed over: a turn begins.

        Raises:
            CheckpointMismatch: as ``AdamW.load_state_dict``.
        """
        is_outer = self._outer.steps.keys()
        outer = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] in is_outer}
        outer_steps = {name: count for name, count in steps.items() if name in is_outer}
        if strict:
            self._block.load_state_dict(
                {key: tensor for key, tensor in tensors.items() if key not in outer},
                {name: count for name, count in steps.items() if name not in outer_steps},
            )
        self._outer.load_state_dict(outer, outer_steps, strict=strict)

    def _advance(self) -> None:
        self._steps_done += 1
        if self._steps_done % self._switch_steps == 0:
            self._activate()

    def _activate(self) -> None:
        """Begin a turn: of all layers, only the active one has gradients and states."""
        self._block = self._adamw({})  # the old states go before the new ones come
        active = self._blocks[self.active_layer]
        for block in self._blocks.values():
            for parameter in block.values():
                parameter.requires_grad_(block is active)
                if block is not active:
                    parameter.grad = None
        self._block = self._adamw(active)


def _by_layer(parameters: Mapping[str, nn.Parameter], layer_prefix: str) -> dict[int, dict[str, nn.Parameter]]:
    """The parameters of each layer by its index, ascending."""
    numbered = re.compile(rf"{re.escape(layer_prefix)}\.(\d+)\.")
    blocks: dict[int, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        match = numbered.match(name)
        if match:
            blocks.setdefault(int(match.group(1)), {})[name] = parameter
    return dict(sorted(blocks.items()))
