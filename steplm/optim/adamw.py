"""AdamW by parameter name, its states exact to the byte: in fp32, or with 8-bit moments and without master weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from steplm.errors import CheckpointMismatch, ConfigError, SteplmError
from steplm.cost.formats import STATE_BLOCK, STEP_CHUNK
from steplm.optim.quantized import CodeBook, round_stochastically_
from steplm.rows import on_this_rank

STATES = ("fp32", "8bit")
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether it has a sign


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return parameter.ndim >= 2


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened parameter: what is updated at once."""

    name: str
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)[self.start : self.stop]

    def scales_of(self, scales: Tensor) -> Tensor:
        """The scales of its blocks; a piece begins where a block does."""
        return scales[self.start // STATE_BLOCK : -(-self.stop // STATE_BLOCK)]


class GradNorm:
    """The global 2-norm of gradients that never exist together."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._square = torch.zeros((), device=device)

    def add(self, gradient: Tensor) -> None:
        self._square += _grad_norm(gradient).square()

    def total(self) -> Tensor:
        """An fp32 scalar on the gradients' device."""
        return self._square.sqrt()


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose arithmetic is fp32, keyed by parameter name.

    A bf16 parameter has an fp32 master weight: the master is updated, and the parameter is the master
    rounded. An fp32 parameter is its own master. All states exist from construction, and each parameter
    counts its own steps, so that one that is new begins its bias correction at 0 while others go on.

    Of a parameter that is sharded over ranks, weight, gradient and states are those of the rows on this one.

    No step sees more than ``STEP_CHUNK`` elements at once: small parameters are updated together, large ones
    in pieces. The workspace of a step, in bytes per element of such a chunk of bf16 parameters (of fp32 ones
    no more):

        states   master_weights   workspace
        fp32     yes              4   fp32 gradient
        fp32     no               9   fp32 weight; gradient, then random bits (4) and mask (1)
        8bit     yes             17   both moments; gradient (4), then indices, boundaries and comparison (9)
        8bit     no              17   the fp32 weight too (16 at the update; 17 when it is rounded, or the moments are)

    Args:
        named_parameters: the trained parameters by name; others may not be among them.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate; see ``decays``.
        states: ``fp32``, or ``8bit`` for the moments of matrices (see ``quantized.CodeBook``). They are then
            rounded at every step; 2 bytes and a little a parameter instead of 8.
        master_weights: False: bf16 parameters have none. The new value is computed in fp32 and rounded
            stochastically, with bits from the device's default generator: seed it before every step where
            runs shall repeat. Saves 4 bytes a parameter.

    Raises:
        ConfigError: unknown ``states``.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        states: str = "fp32",
        master_weights: bool = True,
    ) -> None:
        if states not in STATES:
            raise ConfigError(f"no optimizer states {states!r}. Known: {', '.join(STATES)}.", states=states)
        self.parameters: dict[str, nn.Parameter] = dict(named_parameters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps: dict[str, int] = dict.fromkeys(self.parameters, 0)
        self._states: dict[str, dict[str, Tensor]] = {}
        self._books: dict[tuple[str, torch.device], CodeBook] = {}
        for name, parameter in self.parameters.items():
            weight = on_this_rank(parameter.detach())
            held = self._new_moments(name, weight, quantized=states == "8bit" and weight.ndim >= 2)
            if weight.dtype != torch.float32 and self._wants_master(name, master_weights):
                held["master"] = weight.float()
            self._states[name] = held
        self._pieces = {name: self._cut(name, on_this_rank(p.detach())) for name, p in self.parameters.items()}
        self._buckets = self._make_buckets()

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: float = 1.0) -> None:
        """One update of every parameter that has a gradient.

        ``grad_scale`` multiplies the gradients in fp32 and leaves ``.grad`` as it is.
        """
        with_gradient = {name for name, p in self.parameters.items() if p.grad is not None and self._pieces[name]}
        for bucket in self._buckets:
            self._update([piece for piece in bucket if piece.name in with_gradient], learning_rate, grad_scale)
        for name in with_gradient:
            self.steps[name] += 1

    @contextmanager
    def in_backward(self, learning_rate: float | None) -> Iterator[GradNorm]:
        """Inside, a backward pass updates each parameter as soon as its gradient is there, and frees the gradient.

            with optimizer.in_backward(learning_rate) as norm:
                loss.backward()
            norm.total()

        The result is that of ``step``, but neither clipping nor accumulation is possible: the norm is known,
        and the gradient is gone, when the update is done. Source: LOMO (arXiv 2306.09782).

        Args:
            learning_rate: ``None`` measures and frees the gradients, and updates nothing.

        Raises:
            SteplmError: a second backward pass inside, which would be a second step.
        """
        device = next((parameter.device for parameter in self.parameters.values()), None)
        norm, done = GradNorm(device), set[str]()
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                partial(self._arrived, name=name, learning_rate=learning_rate, norm=norm, done=done)
            )
            for name, parameter in self.parameters.items()
        ]
        try:
            yield norm
        finally:
            for hook in hooks:
                hook.remove()

    def zero_grad(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The states themselves, by parameter name.

        ``exp_avg``, ``exp_avg_sq``, of the weight's shape; in 8 bits they are uint8 codes, and
        ``exp_avg_scale``, ``exp_avg_sq_scale`` hold one fp32 number for each ``STATE_BLOCK`` elements of the
        flattened weight. ``master`` where a bf16 weight has one.
        """
        return {name: dict(states) for name, states in self._states.items()}

    def tables(self) -> list[Tensor]:
        """What 8-bit states need besides themselves, once for all parameters."""
        return [table for book in self._books.values() for table in book.tables()]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The states themselves, flat under ``NAME.KEY`` as safetensors wants them, and the steps by name."""
        return self._flat(), dict(self.steps)

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int], *, strict: bool = True) -> None:
        """Copy saved states in, exactly.

        Args:
            tensors, steps: what ``state_dict`` gave.
            strict: the saved parameters must be these parameters. If not, saved states of others are passed
                over, and parameters of which nothing is saved stay as they are: new ones, after a growth.

        Raises:
            CheckpointMismatch: names differ (if strict), shapes or dtypes differ, or a parameter's states
                are there in part.
        """
        own = self._flat()
        wanted = [name for name in self.steps if strict or name in steps]
        keys = [f"{name}.{key}" for name in wanted for key in self._states[name]]
        missing = [name for name in wanted if name not in steps] + [key for key in keys if key not in tensors]
        unknown = [key for key in (*steps, *tensors) if key not in self.steps and key not in own] if strict else []
        wrong = [key for key in keys if key in tensors and not _alike(own[key], tensors[key])]
        if missing or unknown or wrong:
            parts = {"missing": missing, "unknown": unknown, "of another shape or dtype": wrong}
            told = "; ".join(f"{what}: {_shorten(names)}" for what, names in parts.items() if names)
            raise CheckpointMismatch(
                f"the saved optimizer state does not fit the trained parameters: {told}. "
                "It was saved under another plan, precision or format of the states.",
                missing=missing,
                unknown=unknown,
                wrong=wrong,
            )
        for key in keys:
            own[key].copy_(tensors[key])
        self.steps.update({name: steps[name] for name in wanted})

    def _flat(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, states in self._states.items() for key, tensor in states.items()}

    @torch.no_grad()
    def _arrived(
        self, parameter: Tensor, *, name: str, learning_rate: float | None, norm: GradNorm, done: set[str]
    ) -> None:
        """The gradient of a parameter is complete."""
        assert parameter.grad is not None
        if name in done:
            raise SteplmError(
                f"the gradient of {name} arrived twice within one fused update. It cannot be accumulated: run one "
                "backward pass, on one micro-batch (train.gradient_accumulation_steps=1).",
                name=name,
            )
        done.add(name)
        norm.add(on_this_rank(parameter.grad))
        if learning_rate is not None:
            self._update_alone(name, learning_rate)
        parameter.grad = None

    def _update_alone(self, name: str, learning_rate: float) -> None:
        """One update of one parameter that has a gradient."""
        for piece in self._pieces[name]:
            self._update([piece], learning_rate, 1.0)
        self.steps[name] += 1

    def _wants_master(self, name: str, master_weights: bool) -> bool:
        """Whether a parameter that is not fp32 gets an fp32 copy."""
        return master_weights

    def _new_moments(self, name: str, weight: Tensor, *, quantized: bool) -> dict[str, Tensor]:
        """The states of a parameter before its first step, without the master weight."""
        held: dict[str, Tensor] = {}
        for moment, signed in MOMENTS.items():
            held[moment] = torch.zeros_like(weight, dtype=torch.uint8 if quantized else torch.float32)
            if quantized:
                # Where the scale is 0 every code stands for 0.
                held[_scale(moment)] = torch.zeros(-(-weight.numel() // STATE_BLOCK), device=weight.device)
                if (moment, weight.device) not in self._books:
                    self._books[moment, weight.device] = CodeBook(signed=signed, device=weight.device)
        return held

    def _cut(self, name: str, weight: Tensor) -> list[Piece]:
        """The pieces that a parameter is updated in; none where a subclass updates it as a whole."""
        starts = range(0, weight.numel(), STEP_CHUNK)
        return [Piece(name, start, min(start + STEP_CHUNK, weight.numel())) for start in starts]

    def _update(self, pieces: list[Piece], learning_rate: float, grad_scale: float) -> None:
        """Pieces of one device and one weight decay. What is made here is gone before the next pieces' is made."""
        if not pieces:
            return
        weights = [piece.of(on_this_rank(self.parameters[piece.name].detach())) for piece in pieces]
        moments = {key: [self._read_moment(piece, key) for piece in pieces] for key in MOMENTS}
        masters = [self._read_master(piece, weight) for piece, weight in zip(pieces, weights, strict=True)]
        self._kernel(
            masters,
            self._gradients(pieces, grad_scale),
            moments,
            [self.steps[piece.name] for piece in pieces],
            learning_rate=learning_rate,
            weight_decay=self.weight_decay if decays(self.parameters[pieces[0].name]) else 0.0,
        )
        apart = [index for index, weight in enumerate(weights) if masters[index] is not weight]
        for index in apart:
            if "master" not in self._states[pieces[index].name]:
                round_stochastically_(masters[index])
        if apart:  # in one call: of a small model, a GPU waits for its kernels to be launched
            torch._foreach_copy_([weights[index] for index in apart], [masters[index] for index in apart])
        del masters  # before the moments are rounded, which needs as much
        for key, values in moments.items():
            self._write_moments(pieces, key, values)

    def _kernel(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        moments: Mapping[str, list[Tensor]],
        steps: list[int],
        *,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """AdamW's formula on fp32 tensors, in place, after so many steps of each."""
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
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def _read_moment(self, piece: Piece, key: str) -> Tensor:
        """Fp32: the state itself, or what its codes stand for."""
        states = self._states[piece.name]
        values = piece.of(states[key])
        if _scale(key) not in states:
            return values
        return self._books[key, values.device].dequantize(values, piece.scales_of(states[_scale(key)]))

    def _write_moments(self, pieces: list[Piece], key: str, moments: list[Tensor]) -> None:
        for piece, values in zip(pieces, moments, strict=True):
            states = self._states[piece.name]
            if _scale(key) in states:
                codes, scales = piece.of(states[key]), piece.scales_of(states[_scale(key)])
                self._books[key, values.device].quantize_(values, codes, scales)

    def _read_master(self, piece: Piece, weight: Tensor) -> Tensor:
        """Fp32: the master weight, the weight itself if it is fp32, or else a copy."""
        states = self._states[piece.name]
        return piece.of(states["master"]) if "master" in states else weight.float()  # no copy of what is fp32

    def _gradients(self, pieces: list[Piece], scale: float) -> list[Tensor]:
        """Fp32, times ``scale``: copies, but for fp32 gradients that are not scaled."""
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
        """Pieces for one kernel call each: of one device and one weight decay, together at most ``STEP_CHUNK``."""
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


def carry_state(
    tensors: Mapping[str, Tensor], steps: Mapping[str, int], renamed: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Optimizer state under the names that the parameters have after a growth.

    Args:
        tensors, steps: what ``AdamW.state_dict`` gave.
        renamed: old name -> new name of every weight that outlives the growth. Adapters must not be among
            them: they are merged, and those after the growth are fresh, though they bear the same names.

    Returns:
        Tensors (not copied) and steps, for ``load_state_dict(…, strict=False)``.
    """
    flat = {}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition(".")
        if name in renamed:
            flat[f"{renamed[name]}.{state}"] = tensor
    return flat, {renamed[name]: count for name, count in steps.items() if name in renamed}


@torch.no_grad()
def global_grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients on this rank, an fp32 scalar; bf16 gradients are summed in fp32."""
    gradients = [on_this_rank(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    if all(gradient.is_cuda for gradient in gradients):
        norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    else:
        norms = [_grad_norm(gradient) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_coefficient(norm: Tensor | float, max_norm: float | None) -> float:
    """The factor, at most 1, that brings a gradient of this norm down to ``max_norm`` (``None``: 1)."""
    if max_norm is None:
        return 1.0
    value = float(norm)
    return value if math.isnan(value) else min(1.0, max_norm / (value + 1e-6))


def _as_tensors(steps: list[int], device: torch.device) -> list[Tensor]:
    """What the kernel wants, and adds 1 to before it uses it: an fp32 scalar each, no copy from the host's memory,
    which would wait for the device."""
    counts = torch.full((len(steps),), float(steps[0]), device=device)
    for index, step in enumerate(steps):
        if step != steps[0]:
            counts[index].fill_(step)
    return list(counts.unbind())


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _scale(moment: str) -> str:
    """Name of the state that holds the scales of a moment in 8 bits."""
    return f"{moment}_scale"


def _grad_norm(gradient: Tensor) -> Tensor:
    # Row by row: on a CPU one running fp32 sum over 16M elements is off by 1%. No more rows at once than a
    # step has elements: a CPU makes an fp32 copy of them.
    matrix = torch.atleast_2d(gradient).flatten(0, -2)
    parts = matrix.split(max(1, STEP_CHUNK // max(1, matrix.shape[1])))
    rows = torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in parts])
    return torch.linalg.vector_norm(rows)
