"""Memory in use over time: bytes by kind after each operation, for each part of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from steplm.cost.count import REST
from steplm.cost.measure import ADAPTER_TENSORS
from steplm.optim.build import UpdateRules
from steplm.training.peak_meter import CountedBytes
from steplm.types import HOST

ADAPTERS = "adapters"
GROWN_WEIGHTS, STAGE_WEIGHTS = "grown weights", "weights of the stage"  # parts that create plain weights


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


@dataclass
class _Recorded:
    """A storage: its last label, which applies to its whole lifetime, and its current bytes."""

    label: str
    num_bytes: int = 0


class RecordedBytes(CountedBytes):
    """Records allocations, frees, and operations."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, _Recorded] = {}  # by the address of the storage
        self._parts: list[tuple[str, int]] = []  # name, index of the first event
        self._events: list[tuple[_Recorded | None, int]] = []  # storage (None: end of an operation), change in bytes

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
                on_gradient = partial(self._on_gradient, label=ADAPTERS)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(on_gradient))

    def parts(self) -> list[Part]:
        """The recorded parts, in order."""
        held: dict[str, int] = {}
        parts = []
        edges = [*(index for _, index in self._parts), len(self._events)]
        for (name, start), end in zip(self._parts, edges[1:], strict=False):
            points = []
            for storage, change in self._events[start:end]:
                if storage is None:
                    points.append({label: count for label, count in held.items() if count})
                else:
                    held[storage.label] = held.get(storage.label, 0) + change
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
        recorded = self._live.setdefault(storage._cdata, _Recorded(label))
        recorded.label = label
        if change := storage.nbytes() - recorded.num_bytes:
            self._events.append((recorded, change))
            recorded.num_bytes += change

    def _forget(self, key: int) -> None:
        super()._forget(key)
        recorded = self._live.pop(key)
        self._events.append((recorded, -recorded.num_bytes))

    def _end_operation(self) -> None:
        self._events.append((None, 0))


def on_device(by_kind: dict[str, int]) -> int:
    """Total bytes of all kinds except ``host``."""
    return sum(num_bytes for kind, num_bytes in by_kind.items() if kind != HOST)
