"""Layers in host memory, fetched to the device one layer ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from steplm.pet.packing import Part
from steplm.pinned import host_empty


@dataclass(frozen=True)
class Span:
    """Position of a tensor within the bytes of its layer."""

    offset: int
    part: Part

    @property
    def num_bytes(self) -> int:
        return math.prod(self.part.shape) * self.part.dtype.itemsize

    @property
    def stop(self) -> int:
        return self.offset + self.num_bytes

    def of(self, layer_bytes: Tensor) -> Tensor:
        """The tensor, as a view of ``layer_bytes``."""
        return layer_bytes[self.offset : self.stop].view(self.part.dtype).view(self.part.shape)


def lay_out(parts: Mapping[str, Part]) -> dict[str, Span]:
    """Place the tensors of one layer end to end, the widest dtypes first, so that no padding is needed."""
    spans: dict[str, Span] = {}
    offset = 0
    for name, part in sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize):
        spans[name] = Span(offset, part)
        offset = spans[name].stop
    return spans


def host_buffer(spans: Mapping[str, Span], device: torch.device) -> Tensor:
    """Host memory of exactly the size of one layer's tensors; see ``host_empty``."""
    return host_empty((max(span.stop for span in spans.values()),), torch.uint8, device)


class LayerFetcher:
    """Fetches layers from host memory; the device holds the one in use and the next one.

    The next layer follows from the direction of travel, up in the forward pass and down in the backward pass; at either
    end the direction reverses. A layer that was not prefetched is loaded on demand.

    Args:
        host: the bytes of each layer, bottom to top.
        device: where they are needed. On CUDA, a separate stream copies while the layer in use computes.

    Attributes:
        slots: buffers on the device: two of the largest layer's size, or one if there is only one layer.
        num_fetches: how many times the layer in use changed; for tests.
        num_hits: how many of these times the new layer had been prefetched; for tests.
        bytes_fetched: total bytes copied to the device; for tests.
    """

    def __init__(self, host: Mapping[str, Tensor], device: torch.device) -> None:
        self.host = dict(host)
        self.slots = [
            torch.empty(max(map(len, host.values())), dtype=torch.uint8, device=device)
            for _ in range(min(2, len(host)))
        ]
        self.num_fetches = self.num_hits = self.bytes_fetched = 0
        self._layers = list(host.values())
        self._held: list[int | None] = [None] * len(self.slots)  # the layer in each slot
        self._in_use: int | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event() for _ in self.slots]
            for slot in self.slots:
                slot.record_stream(self._stream)  # the memory must not be reused while a copy is running

    def fetch(self, layer: int) -> Tensor:
        """The bytes of a layer on the device, uint8; valid until another layer is fetched."""
        if layer != self._in_use:
            self._change_to(layer)
        slot = self._held.index(layer)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied[slot])
        return self.slots[slot]

    def forget(self) -> None:
        """Fetch every layer anew from now on: its weights in host memory change."""
        if self._stream is not None:
            self._stream.synchronize()
        self._held, self._in_use = [None] * len(self.slots), None

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
        self.bytes_fetched += len(self._layers[layer])
        if self._stream is not None:
            # All kernels that read this slot were launched earlier, but may still be running.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self.slots[index][: len(self._layers[layer])].copy_(self._layers[layer], non_blocking=True)
            if self._stream is not None:
                self._copied[index].record(self._stream)


@dataclass(frozen=True)
class Offloaded:
    """The tensors of one matrix, within the bytes of an offloaded layer."""

    fetcher: LayerFetcher
    layer: int
    spans: Mapping[str, Span]

    def on_device(self) -> dict[str, Tensor]:
        """Views of a slot; use them immediately and do not keep them."""
        layer_bytes = self.fetcher.fetch(self.layer)
        return {name: span.of(layer_bytes) for name, span in self.spans.items()}
