"""Frozen layers in host memory, fetched to the device one layer ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from steplm.pet.packing import Part


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in the bytes of its layer."""

    offset: int
    part: Part

    @property
    def num_bytes(self) -> int:
        return math.prod(self.part.shape) * self.part.dtype.itemsize

    @property
    def stop(self) -> int:
        return self.offset + self.num_bytes

    def of(self, layer_bytes: Tensor) -> Tensor:
        """The tensor, a view."""
        return layer_bytes[self.offset : self.stop].view(self.part.dtype).view(self.part.shape)


def lay_out(parts: Mapping[str, Part]) -> dict[str, Span]:
    """The tensors of one layer end to end. Those of larger elements come first, so that none needs padding."""
    spans: dict[str, Span] = {}
    offset = 0
    for name, part in sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize):
        spans[name] = Span(offset, part)
        offset = spans[name].stop
    return spans


def host_buffer(spans: Iterable[Span], device: torch.device, *, pin: bool = True) -> Tensor:
    """Host memory for the tensors of one layer, exactly; pinned if ``device`` is CUDA and ``pin``."""
    pinned = pin and device.type == "cuda"
    return torch.empty(max(span.stop for span in spans), dtype=torch.uint8, pin_memory=pinned)


class LayerFetcher:
    """Keeps on the device the layer in use and the one that comes next, of those in host memory.

    What comes next is told by the direction of travel, up in the forward and down in the backward; at either end
    it is the way back. A layer that was not foreseen is loaded when it is asked for.

    Args:
        host: the bytes of each layer, bottom to top.
        device: where they are needed. On CUDA a stream of its own copies, while the layer in use computes.

    Attributes:
        slots: the bytes on the device, two of the largest layer's size (one where there is one layer).
        num_fetches: for tests, how many times the layer in use changed.
        num_hits: for tests, how many of these times the new one had been requested before.
    """

    def __init__(self, host: Mapping[str, Tensor], device: torch.device) -> None:
        self.host = dict(host)
        self.slots = [
            torch.empty(max(map(len, host.values())), dtype=torch.uint8, device=device)
            for _ in range(min(2, len(host)))
        ]
        self.num_fetches = self.num_hits = 0
        self._layers = list(host.values())
        self._held: list[int | None] = [None] * len(self.slots)  # the layer in each slot
        self._in_use: int | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event() for _ in self.slots]
            for slot in self.slots:
                slot.record_stream(self._stream)  # the memory must not be reused under a copy

    def fetch(self, layer: int) -> Tensor:
        """The bytes of a layer on the device, uint8; they hold until another layer is fetched."""
        if layer != self._in_use:
            self._change_to(layer)
        slot = self._held.index(layer)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied[slot])
        return self.slots[slot]

    def _change_to(self, layer: int) -> None:
        self.num_fetches += 1
        if layer in self._held:
            self.num_hits += 1
        else:
            self._load(layer, keep=self._in_use)
        step = -1 if self._in_use is not None and layer < self._in_use else 1
        self._in_use = layer
        following = layer + step if 0 <= layer + step < len(self._layers) else layer - step
        if 0 <= following < len(self._layers) and following not in self._held:
            self._load(following, keep=layer)

    def _load(self, layer: int, keep: int | None) -> None:
        """Copy a layer into the slot that does not hold ``keep``."""
        index = next(index for index, held in enumerate(self._held) if held is None or held != keep)
        self._held[index] = layer
        if self._stream is not None:
            # All kernels that read this slot were launched before this moment, and may be running still.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self.slots[index][: len(self._layers[layer])].copy_(self._layers[layer], non_blocking=True)
            if self._stream is not None:
                self._copied[index].record(self._stream)


@dataclass(frozen=True)
class Offloaded:
    """The tensors of one matrix, in the bytes of a layer."""

    fetcher: LayerFetcher
    layer: int
    spans: Mapping[str, Span]

    def on_device(self) -> dict[str, Tensor]:
        """Views of a slot: used at once, never kept."""
        layer_bytes = self.fetcher.fetch(self.layer)
        return {name: span.of(layer_bytes) for name, span in self.spans.items()}
