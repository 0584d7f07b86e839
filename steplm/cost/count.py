"""Tensor memory, counted as PyTorch operations allocate and free it. Needs torch."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from steplm.types import HOST

REST = "rest"  # default label: activations and workspace
DEVICE = torch.ops.prim.device.default
LIFT_FRESH = torch.ops.aten.lift_fresh.default  # the only op torch.tensor(...) dispatches: a view of a new storage


class _Counted(NamedTuple):
    reference: weakref.ref[torch.UntypedStorage]  # must stay alive for its callback to run
    label: str
    num_bytes: int


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of every storage that is allocated inside it, or passed to ``track``, until it is freed.

    Views and aliases count once. Fake tensors count like the real ones they stand for; tensors on the meta device count
    as zero. Storages labeled ``HOST`` stand for host memory and are excluded from totals.

    Not counted: memory that a kernel allocates and frees internally, and allocator overhead (rounding, fragmentation).

    Attributes:
        current_bytes: bytes allocated now, without host memory.
        peak_bytes: the highest ``current_bytes`` since the start or ``reset_peak``.
        peak_by_label: ``current_by_label`` when the peak was first reached.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, _Counted] = {}
        self._by_label = Counter[str]()
        self._newborn = REST
        self.current_bytes = self.peak_bytes = 0
        self.peak_by_label: dict[str, int] = {}

    @property
    def current_by_label(self) -> dict[str, int]:
        """Bytes allocated now by label, including host memory."""
        return {label: count for label, count in self._by_label.items() if count}

    def reset_peak(self) -> None:
        """Restart the peak at the current count."""
        self.peak_bytes, self.peak_by_label = self.current_bytes, self.current_by_label

    def track(self, tensor: Tensor, label: str) -> None:
        """Count the tensor's storage under ``label`` from now on, even if it already has another label."""
        self._count(tensor.untyped_storage(), label)
        self._update_peak()

    @contextmanager
    def labeling(self, label: str) -> Iterator[None]:
        """Label storages that are allocated inside this context with ``label``."""
        before, self._newborn = self._newborn, label
        try:
            yield
        finally:
            self._newborn = before

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            # Two thirds of all calls are this one, and the fake-tensor mode answers it slowly.
            return args[0].fake_device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is not None:
                self._count(storage, known.label)  # the storage may have been resized
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
        self._by_label[label] += num_bytes
        if label != HOST:
            self.current_bytes += num_bytes

    def _update_peak(self) -> None:
        if self.current_bytes > self.peak_bytes:
            self.reset_peak()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in (values,) if isinstance(values, Tensor) else tree_iter(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value


def _shared(storage: torch.UntypedStorage, values: Any) -> bool:
    """Whether one of the values already uses this storage, so that the operation did not allocate it."""
    return any(storage._cdata == tensor.untyped_storage()._cdata for tensor in _tensors(values))
