"""Compact storage for the frozen layers of a model: quantize or offload their weights, and read them back.

The formats are in ``packing``, the matmul in ``frozen_linear``, the offload in ``host``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from steplm.cost.formats import PACK_CHUNK
from steplm.errors import ConfigError
from steplm.pet.frozen_linear import FrozenLinear
from steplm.pet.host import LayerFetcher, Offloaded, Span, host_buffer, lay_out
from steplm.pet.packing import FORMATS, Part


@dataclass(frozen=True)
class PackReport:
    """Result of ``pack_frozen``."""

    num_matrices: int
    relative_rms_error: float | None  # over all their elements, in fp32; None if fake tensors are quantized


def pack_frozen(
    model: nn.Module,
    layer_prefix: str,
    layers: Iterable[int],
    *,
    fmt: str,
    offload: bool,
    device: torch.device | str | None = None,
    pin: bool = True,
) -> PackReport:
    """Quantize or offload the frozen weights of all linear modules in ``layers``, freeing plain weights one by one.

    Args:
        layer_prefix: name of the list of layers, such as ``model.layers``.
        fmt: a key of ``FORMATS``; ``full`` without ``offload`` changes nothing.
        offload: keep the weights in host memory.
        device: where the weights are needed; by default, their current device. For a model that is still on the CPU,
            one matrix at a time is moved there, and never the whole model.
        pin: with ``offload`` and a CUDA device, pin the host memory, so that copies overlap with compute.

    Raises:
        ConfigError: an unknown format.
    """
    if fmt not in FORMATS:
        raise ConfigError(f"no format {fmt!r} for frozen weights. Known: {', '.join(FORMATS)}.", format=fmt)
    if fmt == "full" and not offload:
        return PackReport(0, 0.0)
    found = {name: _frozen_linears(model, name) for name in (f"{layer_prefix}.{index}" for index in sorted(layers))}
    named = {layer: linears for layer, linears in found.items() if linears}
    where = None if device is None else torch.device(device)
    host: dict[str, Tensor] = {}
    places: list[tuple[FrozenLinear, int, dict[str, Span]]] = []
    num_matrices = 0
    squares: list[Tensor] = []
    for layer, linears in named.items():
        spans = lay_out(_expected_parts(linears, fmt))
        if offload:
            where = where or next(iter(linears.values())).weight.device
            host[layer] = host_buffer(spans, where if pin else torch.device("cpu"))
        for name, linear in linears.items():
            weight = linear.weight.detach()
            weight = weight if fmt == "full" else weight.to(where)  # an unquantized matrix goes straight to the host
            parts = FORMATS[fmt].pack(weight)
            num_matrices += 1
            if fmt != "full":  # "full" is exact
                squares.append(_squares(weight, FORMATS[fmt].unpack(parts, linear.shape, linear.dtype)))
            linear.weight = None  # type: ignore[assignment]
            linear.format = fmt
            if offload:
                own = {key: spans[f"{name}.{key}"] for key in parts}
                for key, span in own.items():
                    span.of(host[layer]).copy_(parts[key])
                places.append((linear, len(host) - 1, own))
            else:
                for key, tensor in parts.items():
                    linear.register_buffer(key, tensor, persistent=False)
    if host:
        assert where is not None
        fetcher = LayerFetcher(host, where)  # only now, so that its slots can use the memory of the freed weights
        for linear, layer_index, own in places:
            linear.offloaded = Offloaded(fetcher, layer_index, own)
    return PackReport(num_matrices, _relative_rms_error(squares))


def unpacked_state(model: nn.Module) -> dict[str, Tensor]:
    """The packed weights as plain CPU tensors by full name, ``…q_proj.weight``.

    They are exactly what the packed weights represent: packed again, they give the same codes and scales.
    """
    # Always copy: the materialized weight may be a view of a slot that the next layer overwrites.
    return {f"{name}.weight": linear.materialize().to("cpu", copy=True) for name, linear in _packed_linears(model)}


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """All tensors that store packed weights, and the offload's device buffers: name, tensor, whether on the host.

    An offloaded layer is one tensor under the layer's name; the fetcher's slots are ``staging.0`` and ``staging.1``.
    """
    fetchers: dict[int, LayerFetcher] = {}
    for name, linear in _packed_linears(model):
        if linear.offloaded is not None:
            fetchers[id(linear.offloaded.fetcher)] = linear.offloaded.fetcher
        else:
            yield from ((f"{name}.{key}", tensor, False) for key, tensor in linear.packed().items())
    for fetcher in fetchers.values():
        yield from ((layer, tensor, True) for layer, tensor in fetcher.host.items())
        yield from ((f"staging.{index}", slot, False) for index, slot in enumerate(fetcher.slots))


def _packed_linears(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.format is not None:
            yield name, module


def _frozen_linears(model: nn.Module, layer_name: str) -> dict[str, FrozenLinear]:
    """The linear modules of a layer with frozen plain weights, by full name, converted to ``FrozenLinear``."""
    linears: dict[str, FrozenLinear] = {}
    for name, module in list(model.get_submodule(layer_name).named_modules(prefix=layer_name)):
        if not isinstance(module, nn.Linear) or module.weight is None or module.weight.requires_grad:
            continue
        if type(module) is nn.Linear:
            module = FrozenLinear(module)
            model.set_submodule(name, module)
        if isinstance(module, FrozenLinear):  # a model family's own subclass of nn.Linear stays as it is
            linears[name] = module
    return linears


def _expected_parts(linears: Mapping[str, FrozenLinear], fmt: str) -> dict[str, Part]:
    return {
        f"{name}.{key}": part
        for name, linear in linears.items()
        for key, part in FORMATS[fmt].parts(linear.shape, linear.dtype).items()
    }


def _squares(weight: Tensor, restored: Tensor) -> Tensor:
    """Sums of squares of the error and of the weight, of shape (2,)."""
    rows = max(PACK_CHUNK // weight.shape[1], 1)
    sums = weight.new_zeros(2, dtype=torch.float32)
    for before, after in zip(weight.split(rows), restored.split(rows), strict=True):
        exact = before.float()
        sums += torch.stack(((exact - after).square().sum(), exact.square().sum()))
    return sums


def _relative_rms_error(squares: list[Tensor]) -> float | None:
    if any(isinstance(sums, FakeTensor) for sums in squares):
        return None
    error, norm = torch.stack(squares).double().sum(0).tolist() if squares else (0.0, 0.0)
    return math.sqrt(error / norm) if norm else 0.0
