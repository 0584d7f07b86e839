"""The bytes that tensors hold, counted as PyTorch's operations make and free them. Needs torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from steplm.types import HOST

REST = "rest"  # whatever nobody has labelled: activations and workspace
DEVICE = torch.ops.prim.device.default
LIFT_FRESH = torch.ops.aten.lift_fresh.default  # all that is dispatched of torch.tensor(...): a view of a new storage


class _Counted(NamedTuple):
    reference: weakref.ref[torch.UntypedStorage]  # kept alive for its callback
    label: str
    num_bytes: int


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of every storage that is born inside it, or given to ``track``, until the storage dies.

    Views and aliases count once. Fake tensors count as the real ones that they stand for, tensors on the meta
    device as nothing. Storages labelled ``HOST`` stand for the host's memory and are part of no total.

    Not seen: what a kernel allocates and frees inside itself, and what an allocator adds (rounding, fragmentation).
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, _Counted] = {}
        self._by_label: dict[str, int] = {}
        self._newborn = REST
        self._total = 0
        self._peak, self._peak_by_label = 0, dict[str, int]()

    @property
    def current_bytes(self) -> int:
        """Bytes alive now, without the host's."""
        return self._total

    @property
    def current_by_label(self) -> dict[str, int]:
        """Bytes alive now, the host's too."""
        return {label: count for label, count in self._by_label.items() if count}

    @property
    def peak_bytes(self) -> int:
        """The highest ``current_bytes`` since the start or ``reset_peak``."""
        return self._peak

    @property
    def peak_by_label(self) -> dict[str, int]:
        """``current_by_label`` at the first instant of the peak."""
        return self._peak_by_label

    def reset_peak(self) -> None:
        """Start a new peak at the present count."""
        self._peak, self._peak_by_label = self._total, self.current_by_label

    def track(self, tensor: Tensor, label: str) -> None:
        """Count the tensor's storage from now on under ``label``, whether it is counted already or not."""
        self._count(tensor.untyped_storage(), label)
        self._update_peak()

    @contextmanager
    def labelling(self, label: str) -> Iterator[None]:
        """Storages born inside count under ``label``."""
        before, self._newborn = self._newborn, label
        try:
            yield
        finally:
            self._newborn = before

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            # Two of three calls are this one; asked of the mode below, it is slow.
            return args[0].fake_device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is not None:
                self._count(storage, known.label)  # it may have been resized
            elif tensor.device.type != "meta" and (func is LIFT_FRESH or not _shared(storage, (args, kwargs))):
                self._count(storage, self._newborn)
        self._update_peak()
        return result

    def _count(self, storage: torch.UntypedStorage, label: str) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            reference = weakref.ref(storage, lambda _: self._forget(key))
        elif (known.label, known.num_bytes) == (label, num_bytes):
            return
        else:
            reference = known.reference
            self._add(known.label, -known.num_bytes)
        self._storages[key] = _Counted(reference, label, num_bytes)
        self._add(label, num_bytes)

    def _forget(self, key: int) -> None:
        dead = self._storages.pop(key)
        self._add(dead.label, -dead.num_bytes)

    def _add(self, label: str, num_bytes: int) -> None:
        self._by_label[label] = self._by_label.get(label, 0) + num_bytes
        if label != HOST:
            self._total += num_bytes

    def _update_peak(self) -> None:
        if self._total > self._peak:
            self.reset_peak()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in (values,) if isinstance(values, Tensor) else tree_iter(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value


def _shared(storage: torch.UntypedStorage, values: Any) -> bool:
    """Whether one of the values is a view of the storage: then it is not born here, and nobody asked to count it."""
    return any(storage._cdata == tensor.untyped_storage()._cdata for tensor in _tensors(values))
