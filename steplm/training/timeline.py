"""Memory in use over time: bytes by kind after each operation, for each part of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steplm.cost.count import REST
from steplm.cost.measure import ADAPTER_TENSORS
from steplm.optim.build import UpdateRules
from steplm.training.peak_meter import CountedBytes
from steplm.types import HOST

ADAPTERS = "adapters"
GROWN_WEIGHTS, STAGE_WEIGHTS = "grown weights", "weights of the stage"  # parts that create plain weights

_OPERATION_DONE = -1  # in place of a storage number in the events


@dataclass(frozen=True)
class Part:
    """Bytes by kind after each operation of one part of a stage, in time order.

    The kinds are ``weights``, ``gradients``, ``optimizer``, ``adapters`` (their weights, gradients and states),
    ``rest`` (activations and workspace) and ``host``.
    """

    name: str
    points: tuple[dict[str, int], ...]

    @property
    def highest(self) -> dict[str, int]:
        """The point with the most bytes on the device; the first if there are several."""
        return max(self.points, key=on_device)

    @property
    def peak_bytes(self) -> int:
        return on_device(self.highest)


class RecordedBytes(CountedBytes):
    """Records allocations, frees, and operations; a storage's last label applies to its whole lifetime."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number
        self._sizes: list[int] = []  # by number: current bytes
        self._names: list[str] = []  # by number: last label
        self._parts: list[tuple[str, int]] = []  # name, index of the first event
        self._events: list[tuple[int, int]] = []  # storage number, change in bytes

    def start(self, part: str) -> None:
        """Start a new part; everything recorded from now on belongs to it."""
        super().start(part)
        # Weights are created on the host. Those that the model does not keep unchanged never reach the device.
        self._newborn = HOST if part in (GROWN_WEIGHTS, STAGE_WEIGHTS) else REST
        self._parts.append((part, len(self._events)))
        self._end_operation()

    def watch(self, model: nn.Module, optimizer: UpdateRules | None = None) -> None:
        super().watch(model, optimizer)
        states = optimizer.state_tensors() if optimizer else {}
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ADAPTER_TENSORS:
                on_host = optimizer is not None and optimizer.host is not None
                for tensor in (parameter, *(() if on_host else states[name].values())):
                    self.track(tensor, ADAPTERS)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_adapter_gradient))

    def parts(self) -> list[Part]:
        """The recorded parts, in order."""
        held: dict[str, int] = {}
        parts = []
        edges = [*(index for _, index in self._parts), len(self._events)]
        for (name, start), end in zip(self._parts, edges[1:], strict=False):
            points = []
            for number, change in self._events[start:end]:
                if number == _OPERATION_DONE:
                    points.append({label: count for label, count in held.items() if count})
                else:
                    held[self._names[number]] = held.get(self._names[number], 0) + change
            parts.append(Part(name, tuple(points)))
        return parts

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = len(self._events)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self._events) > before:
            self._end_operation()
        return result

    def _count(self, storage: torch.UntypedStorage, label: str) -> None:
        super()._count(storage, label)
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._numbers:
            self._numbers[key] = len(self._sizes)
            self._sizes.append(0)
            self._names.append(label)
        number = self._numbers[key]
        self._names[number] = label
        if num_bytes != self._sizes[number]:
            self._events.append((number, num_bytes - self._sizes[number]))
            self._sizes[number] = num_bytes

    def _forget(self, key: int) -> None:
        super()._forget(key)
        number = self._numbers.pop(key)
        self._events.append((number, -self._sizes[number]))

    def _end_operation(self) -> None:
        self._events.append((_OPERATION_DONE, 0))

    def _on_adapter_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.track(parameter.grad, ADAPTERS)


def on_device(by_kind: dict[str, int]) -> int:
    """Total bytes of all kinds except ``host``."""
    return sum(num_bytes for kind, num_bytes in by_kind.items() if kind != HOST)
