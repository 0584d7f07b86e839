"""The whole course of a count: what was held after each operation, part by part, and by which name."""

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
GROWN_WEIGHTS, STAGE_WEIGHTS = "grown weights", "weights of the stage"  # parts in which plain weights are made

_OPERATION_DONE = -1  # stands in the place of a storage's number


@dataclass(frozen=True)
class Part:
    """Bytes by kind after each operation of one part of a stage, in the order of time.

    The kinds are ``weights``, ``gradients``, ``optimizer``, ``adapters`` (their weights, gradients and states),
    ``rest`` (activations and workspace) and ``host``.
    """

    name: str
    points: tuple[dict[str, int], ...]

    @property
    def highest(self) -> dict[str, int]:
        """The first point with the most bytes on the device."""
        return max(self.points, key=on_device)

    @property
    def peak_bytes(self) -> int:
        return on_device(self.highest)


class RecordedBytes(CountedBytes):
    """Writes down births, deaths and operations: a storage has its last name from its birth on."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}  # address of a living storage -> its number
        self._sizes: list[int] = []  # by number: bytes now
        self._names: list[str] = []  # by number: last label
        self._parts: list[tuple[str, int]] = []  # name, index of the first event
        self._events: list[tuple[int, int]] = []  # number of a storage, bytes more or less

    def start(self, part: str) -> None:
        """What comes now belongs to this part."""
        # Weights come from the host: those that no model keeps as they are have never been on the device.
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
        """All that was recorded."""
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
    """Bytes of all kinds but the host's."""
    return sum(num_bytes for kind, num_bytes in by_kind.items() if kind != HOST)
