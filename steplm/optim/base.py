"""Base class of all update rules: parameters and states by name, checkpoints, and the fused backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steplm.cost.formats import STEP_CHUNK, scales_shape
from steplm.errors import CheckpointMismatch, SteplmError
from steplm.optim.quantized import CodeBook
from steplm.rows import on_this_rank

MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
CodeBooks = dict[tuple[bool, torch.device], CodeBook]  # key: whether the state is signed, and its device
NamedParameters = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]


class GradNorm:
    """The global 2-norm of gradients that never exist all at once; each parameter has one."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._square = torch.zeros((), device=next((parameter.device for parameter in parameters), None))
        self._names = set[str]()

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of a parameter.

        Raises:
            SteplmError: the parameter has had its gradient.
        """
        if name in self._names:
            raise SteplmError(
                f"the gradient of {name} arrived twice within one fused update. Fused updates cannot accumulate "
                "gradients: run one backward pass, on one micro-batch (train.gradient_accumulation_steps=1).",
                name=name,
            )
        self._names.add(name)
        self._square += grad_norm(on_this_rank(gradient)).square()

    def total(self) -> Tensor:
        """The norm, an fp32 scalar on the gradients' device."""
        return self._square.sqrt()


class RuleBase(ABC):
    """An update rule over named parameters. Subclasses define the states of a parameter and how to update it.

    Args:
        weight_decay: decoupled, multiplied by the learning rate.
        books: lookup tables of 8-bit states, which rules can share.

    Attributes:
        compute_device: where matmuls of whole matrices run; None: on the parameters' device.
    """

    def __init__(self, *, weight_decay: float, books: CodeBooks | None = None) -> None:
        self.weight_decay = weight_decay
        self.parameters: dict[str, nn.Parameter] = {}
        self.steps: dict[str, int] = {}
        self._states: dict[str, dict[str, Tensor]] = {}
        self._books: CodeBooks = {} if books is None else books
        self.compute_device: torch.device | None = None

    def set_parameters(self, named_parameters: NamedParameters) -> None:
        """Update these parameters from now on.

        Parameters that the rule already updates keep their states. Those of dropped parameters are freed before new
        states are allocated.
        """
        parameters = dict(named_parameters)
        for name in self.parameters.keys() - parameters.keys():
            del self._states[name], self.steps[name]
        self.parameters = parameters
        for name, parameter in parameters.items():
            if name not in self._states:
                self._states[name], self.steps[name] = self._new_states(name, parameter), 0

    @abstractmethod
    def _new_states(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The states of a parameter before its first step."""

    def _is_ready(self, name: str) -> bool:
        """Prepare the update of a parameter that has a gradient, and return whether it can be updated."""
        return True

    @abstractmethod
    def _update(self, names: list[str], learning_rate: float, grad_scale: float) -> None:
        """Update these parameters, each of which has a gradient, without changing ``steps``."""

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: float = 1.0, among: Iterable[str] | None = None) -> None:
        """Update every parameter that has a gradient.

        Args:
            grad_scale: multiplies the gradients in fp32; ``.grad`` itself is unchanged.
            among: names of the only parameters to update; default: all.
        """
        among = self.parameters if among is None else among
        names = [name for name in among if self.parameters[name].grad is not None and self._is_ready(name)]
        self._update(names, learning_rate, grad_scale)
        for name in names:
            self.steps[name] += 1

    @contextmanager
    def in_backward(
        self, learning_rate: float | None, grad_scale: float = 1.0, norm: GradNorm | None = None
    ) -> Iterator[GradNorm]:
        """Make a backward pass inside this context update each parameter as soon as its gradient is complete.

            with rule.in_backward(learning_rate) as norm:
                loss.backward()
            norm.total()

        Each gradient is freed right after its update. Gradients can therefore not be accumulated, and ``grad_scale``
        must be chosen before their norm is known. Source: LOMO (arXiv 2306.09782).

        Args:
            learning_rate: ``None`` measures and frees the gradients without an update.
            grad_scale: multiplies the gradients in the update, not in the norm.
            norm: a norm to add the gradients to, for example one shared with other rules.

        Raises:
            SteplmError: a second backward pass runs inside the context.
        """
        norm = norm or GradNorm(self.parameters.values())
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: self.update_in_backward(name, learning_rate, grad_scale, norm)
            )
            for name, parameter in self.parameters.items()
        ]
        try:
            yield norm
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def update_in_backward(self, name: str, learning_rate: float | None, grad_scale: float, norm: GradNorm) -> None:
        """Update a parameter whose gradient is complete, and free the gradient; see ``in_backward``."""
        parameter = self.parameters[name]
        assert parameter.grad is not None
        norm.add(name, parameter.grad)
        if learning_rate is not None:
            self.step(learning_rate, grad_scale, among=[name])
        parameter.grad = None

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients; see ``global_grad_norm``."""
        return global_grad_norm(self.parameters.values())

    def zero_grad(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The states themselves, not copies, by parameter name and state name."""
        return {name: dict(states) for name, states in self._states.items()}

    def tables(self) -> list[Tensor]:
        """Lookup tables of 8-bit states, which all parameters share."""
        return [table for book in self._books.values() for table in book.tables()]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The states themselves under flat names ``PARAMETER.STATE``, as safetensors needs them, and the steps."""
        return self._flat(), dict(self.steps)

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int], *, strict: bool = True) -> None:
        """Copy saved states into this rule's.

        Args:
            tensors, steps: the result of ``state_dict``.
            strict: require that exactly this rule's parameters were saved. Otherwise ignore the states of other
                parameters, and leave parameters without saved states unchanged (new ones, after a growth).

        Raises:
            CheckpointMismatch: names (if ``strict``), shapes or dtypes differ, or only some states of a parameter
                were saved.
        """
        own = self._flat()
        wanted = [name for name in self.steps if strict or name in steps]
        keys = [f"{name}.{key}" for name in wanted for key in self._states[name]]
        mismatches = {
            "missing": [name for name in wanted if name not in steps] + [key for key in keys if key not in tensors],
            "unknown": [key for key in (*steps, *tensors) if strict and key not in self.steps and key not in own],
            "wrong": [key for key in keys if key in tensors and not _alike(own[key], tensors[key])],
        }
        if any(mismatches.values()):
            titles = {"missing": "missing", "unknown": "unknown", "wrong": "of another shape or dtype"}
            listed = "; ".join(f"{titles[kind]}: {_shorten(names)}" for kind, names in mismatches.items() if names)
            raise CheckpointMismatch(
                f"the saved optimizer state does not fit the trained parameters: {listed}. "
                "It was saved under another plan, precision or format of the states.",
                **mismatches,
            )
        for key in keys:
            own[key].copy_(tensors[key])
        self.steps.update({name: steps[name] for name in wanted})

    def _new_moment(
        self, key: str, weight: Tensor, states: str, *, signed: bool, shape: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """A moment of zeros for a weight in the format ``states``, by name, with the scales of 8-bit codes.

        Args:
            shape: of the scales; default: that of one state for the whole weight.
        """
        held = {key: weight.new_zeros(weight.shape, dtype=MOMENT_DTYPES[states])}
        if states == "8bit":  # with a scale of 0, every code represents 0
            held[f"{key}_scale"] = weight.new_zeros(shape or scales_shape(weight.shape), dtype=torch.float32)
            self._book(signed=signed, device=weight.device)  # allocates the tables before the first step
        return held

    def _read_moment(self, values: Tensor, scales: Tensor | None, *, signed: bool) -> Tensor:
        """Some elements of a moment in fp32: the state itself, or a copy; ``scales`` are those of 8-bit codes."""
        if scales is None:
            return values.float()
        book = self._book(signed=signed, device=values.device)
        return book.dequantize(values.view(-1), scales).view_as(values)

    def _write_moment(self, moment: Tensor, values: Tensor, scales: Tensor | None, *, signed: bool) -> None:
        """Round a result of ``_read_moment`` into the state; may overwrite ``moment``."""
        if scales is not None:
            self._book(signed=signed, device=values.device).quantize_(moment.view(-1), values.view(-1), scales)
        elif values.dtype != torch.float32:
            values.copy_(moment)

    def _book(self, *, signed: bool, device: torch.device) -> CodeBook:
        key = (signed, device)
        if key not in self._books:
            self._books[key] = CodeBook(signed=signed, device=device)
        return self._books[key]

    def _flat(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor for name, states in self.state_tensors().items() for key, tensor in states.items()
        }


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return parameter.ndim >= 2


def grad_norm(gradient: Tensor) -> Tensor:
    """The 2-norm of a tensor in fp32, a scalar."""
    # Row by row, because on a CPU a single running fp32 sum over 16M elements is off by 1%. In chunks of at most
    # STEP_CHUNK elements, because a CPU makes an fp32 copy of them.
    matrix = torch.atleast_2d(gradient).flatten(0, -2)
    parts = matrix.split(max(1, STEP_CHUNK // max(1, matrix.shape[1])))
    rows = torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in parts])
    return torch.linalg.vector_norm(rows)


@torch.no_grad()
def global_grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients on this rank, an fp32 scalar; bf16 gradients are summed in fp32."""
    gradients = [on_this_rank(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    if all(gradient.is_cuda for gradient in gradients):
        norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    else:
        norms = [grad_norm(gradient) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
