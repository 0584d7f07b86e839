"""AdamW keyed by parameter name, with states of exactly known size: fp32, or 8-bit moments without master weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from steplm.cost.formats import STATE_BLOCK, STEP_CHUNK
from steplm.errors import ConfigError
from steplm.optim.base import CodeBooks, NamedParameters, RuleBase, decays
from steplm.optim.masters import new_master, read_weight, split_
from steplm.optim.quantized import round_stochastically_
from steplm.rows import on_this_rank

STATES = ("fp32", "8bit")
INHERITED = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # states that a new layer can inherit
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # each moment, and whether it is signed


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened parameter, which are updated at once."""

    name: str
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)[self.start : self.stop]

    def scales_of(self, scales: Tensor) -> Tensor:
        """The scales of its blocks; a piece starts at a block boundary."""
        return scales.view(-1)[self.start // STATE_BLOCK : -(-self.stop // STATE_BLOCK)]


class AdamW(RuleBase):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) in fp32 arithmetic, keyed by parameter name.

    A bf16 parameter has an fp32 master weight: the update changes the master, and the parameter is the rounded
    master. An fp32 parameter is its own master. The constructor allocates all states. Each parameter counts its
    own steps, so a new parameter starts its bias correction at 0 while the others continue.

    For a parameter that is sharded over ranks, weight, gradient and states are this rank's rows.

    A step works on at most ``STEP_CHUNK`` elements at once: small parameters are updated together, large ones in
    chunks. The workspace of a step, in bytes per element of such a chunk of bf16 parameters (fp32 parameters need
    no more):

        states   master_weights   workspace
        fp32     yes              4   fp32 gradient
        fp32     no               9   fp32 weight; gradient, then random bits (4) and mask (1)
        8bit     yes             17   both moments; gradient (4), then indices, boundaries and comparison (9)
        8bit     no              17   the fp32 weight too (16 at the update; 17 when it is rounded, or the moments are)

    ``master_weights="8bit"`` needs as much as no master weights, but splitting the fp32 weight takes 8 bytes where
    rounding it takes 9.

    Args:
        named_parameters: the trained parameters by name, without any frozen ones.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the learning rate; see ``decays``.
        states: ``fp32``, or ``8bit`` for the moments of matrices (see ``quantized.CodeBook``), which are then
            rounded at every step and take slightly more than 2 bytes per parameter instead of 8.
        master_weights: False: bf16 parameters have none. The new value is computed in fp32 and rounded
            stochastically, with bits from the device's default generator; seed it before every step for
            reproducible runs. Saves 4 bytes per parameter. ``8bit``: one byte per parameter instead of 4, which
            stores the rounding error of the weight; see ``steplm.optim.masters``.

    Raises:
        ConfigError: unknown ``states``.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        states: str = "fp32",
        master_weights: bool | str = True,
        books: CodeBooks | None = None,
    ) -> None:
        if states not in STATES:
            raise ConfigError(f"no optimizer states {states!r}. Known: {', '.join(STATES)}.", states=states)
        super().__init__(weight_decay=weight_decay, books=books)
        self.betas, self.eps, self.states, self.master_weights = betas, eps, states, master_weights
        self.set_parameters(named_parameters)

    def set_parameters(self, named_parameters: NamedParameters) -> None:
        super().set_parameters(named_parameters)
        self._pieces = {name: _cut(name, on_this_rank(p.detach())) for name, p in self.parameters.items()}
        self._buckets = self._make_buckets()

    def _update(self, names: list[str], learning_rate: float, grad_scale: float) -> None:
        if len(names) == 1:  # a fused backward pass must not scan all buckets for each parameter
            (name,) = names
            for piece in self._pieces[name]:
                self._update_pieces([piece], learning_rate, grad_scale)
            return
        chosen = set(names)
        for bucket in self._buckets:
            self._update_pieces([piece for piece in bucket if piece.name in chosen], learning_rate, grad_scale)

    def _new_states(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        weight, held = on_this_rank(parameter.detach()), dict[str, Tensor]()
        for moment, signed in MOMENTS.items():
            held |= self._new_moment(moment, weight, self.states if weight.ndim >= 2 else "fp32", signed=signed)
        return held | new_master(weight, self.master_weights)

    def _update_pieces(self, pieces: list[Piece], learning_rate: float, grad_scale: float) -> None:
        """Update pieces of one device and one weight decay, and free all temporaries before the next call."""
        if not pieces:
            return
        weights = [piece.of(on_this_rank(self.parameters[piece.name].detach())) for piece in pieces]
        moments = {
            key: [self._read_moment(*self._moment(piece, key), signed=signed) for piece in pieces]
            for key, signed in MOMENTS.items()
        }
        masters = [
            read_weight(weight, self._states[piece.name], piece.of)
            for piece, weight in zip(pieces, weights, strict=True)
        ]
        adamw_(
            masters,
            self._gradients(pieces, grad_scale),
            moments,
            [self.steps[piece.name] for piece in pieces],
            betas=self.betas,
            eps=self.eps,
            learning_rate=learning_rate,
            weight_decay=self.weight_decay if decays(self.parameters[pieces[0].name]) else 0.0,
        )
        apart = []
        for index, piece in enumerate(pieces):
            states = self._states[piece.name]
            if "correction" in states:
                split_(masters[index], weights[index], piece.of(states["correction"]))
            elif masters[index] is not weights[index]:
                apart.append(index)
                if "master" not in states:
                    round_stochastically_(masters[index])
        if apart:  # in one call, because updates of small models are bound by kernel launches
            torch._foreach_copy_([weights[index] for index in apart], [masters[index] for index in apart])
        del masters  # rounding the moments needs as much memory again
        for key, values in moments.items():
            for piece, moment in zip(pieces, values, strict=True):
                self._write_moment(moment, *self._moment(piece, key), signed=MOMENTS[key])

    def _moment(self, piece: Piece, key: str) -> tuple[Tensor, Tensor | None]:
        """The elements of a moment, and the scales of 8-bit codes."""
        states = self._states[piece.name]
        scales = states.get(f"{key}_scale")
        return piece.of(states[key]), None if scales is None else piece.scales_of(scales)

    def _gradients(self, pieces: list[Piece], scale: float) -> list[Tensor]:
        """Gradients in fp32, times ``scale``: copies, unless they are in fp32 already and ``scale`` is 1."""
        gradients = []
        for piece in pieces:
            gradient = self.parameters[piece.name].grad
            assert gradient is not None
            gradients.append(on_this_rank(gradient).reshape(-1)[piece.start : piece.stop])
        if scale == 1.0 and all(gradient.dtype == torch.float32 for gradient in gradients):
            return gradients
        copies = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(copies, gradients)
        if scale != 1.0:
            torch._foreach_mul_(copies, scale)
        return copies

    def _make_buckets(self) -> list[list[Piece]]:
        """Group pieces into kernel calls: one device and weight decay each, at most ``STEP_CHUNK`` elements."""
        buckets: list[list[Piece]] = []
        open_buckets: dict[tuple[torch.device, bool], tuple[list[Piece], int]] = {}
        for name, parameter in self.parameters.items():
            kind = (parameter.device, decays(parameter))
            for piece in self._pieces[name]:
                bucket, size = open_buckets.get(kind, ([], STEP_CHUNK))
                if size + piece.stop - piece.start > STEP_CHUNK:
                    bucket, size = [], 0
                    buckets.append(bucket)
                bucket.append(piece)
                open_buckets[kind] = (bucket, size + piece.stop - piece.start)
        return buckets


def adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    moments: Mapping[str, list[Tensor]],
    steps: list[int],
    *,
    betas: tuple[float, float],
    eps: float,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Apply one AdamW step to fp32 tensors in place; ``steps`` counts the previous steps of each tensor."""
    adamw(
        weights,
        gradients,
        moments["exp_avg"],
        moments["exp_avg_sq"],
        [],
        _as_tensors(steps, weights[0].device),
        foreach=False,
        capturable=False,
        differentiable=False,
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def carry_state(
    tensors: Mapping[str, Tensor], steps: Mapping[str, int], renamed: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Optimizer state under the parameter names after a growth.

    Args:
        tensors, steps: the result of ``AdamW.state_dict``.
        renamed: old name -> new name of every weight that survives the growth. Must not contain adapters: they are
            merged, and the adapters after the growth are fresh even where they have the same names.

    Returns:
        Tensors (not copied) and steps, for ``load_state_dict(…, strict=False)``.
    """
    flat = {}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition(".")
        if name in renamed:
            flat[f"{renamed[name]}.{state}"] = tensor
    return flat, {renamed[name]: count for name, count in steps.items() if name in renamed}


def inherited_state(
    tensors: Mapping[str, Tensor], steps: Mapping[str, int], parents: Mapping[str, tuple[list[str], float]]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Moments for the weights of new layers, interpolated between those of their parents; see ``LayerOrigin``.

    Args:
        tensors, steps: the result of ``state_dict`` before the growth.
        parents: for each new weight, the names of its one or two parents, and its position between them.

    Returns:
        Tensors and steps, for ``load_state_dict(…, strict=False)``. Weights whose parents have no moments, or 8-bit
        moments, are left out.
    """
    inherited: dict[str, Tensor] = {}
    inherited_steps: dict[str, int] = {}
    for name, (of, fraction) in parents.items():
        for key in INHERITED:
            moments = [tensors[f"{parent}.{key}"] for parent in of if f"{parent}.{key}" in tensors]
            if len(moments) == len(of) and all(moment.is_floating_point() for moment in moments):
                inherited[f"{name}.{key}"] = torch.lerp(moments[0], moments[-1], fraction)
                inherited_steps[name] = min(steps[parent] for parent in of)
    return inherited, inherited_steps


def clip_coefficient(norm: Tensor | float, max_norm: float | None) -> float:
    """The factor, at most 1, that clips a gradient of this norm to ``max_norm`` (``None``: no clipping)."""
    if max_norm is None:
        return 1.0
    value = float(norm)
    return value if math.isnan(value) else min(1.0, max_norm / (value + 1e-6))


def _as_tensors(steps: list[int], device: torch.device) -> list[Tensor]:
    """Step counts for the fused kernel, one fp32 scalar each; the kernel adds 1 before it uses them.

    They are made on the device, because a copy from host memory would wait for the device.
    """
    counts = torch.full((len(steps),), float(steps[0]), device=device)
    for index, step in enumerate(steps):
        if step != steps[0]:
            counts[index].fill_(step)
    return list(counts.unbind())


def _cut(name: str, weight: Tensor) -> list[Piece]:
    """Split a parameter into the pieces in which it is updated."""
    starts = range(0, weight.numel(), STEP_CHUNK)
    return [Piece(name, start, min(start + STEP_CHUNK, weight.numel())) for start in starts]
