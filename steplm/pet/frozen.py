"""Frozen matrices in less memory: packed, made whole when a product needs them, never saved by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from steplm.errors import CheckpointMismatch, ConfigError
from steplm.pet.host import LayerFetcher, Offloaded, Span, host_buffer, lay_out
from steplm.pet.packing import CHUNK, FORMATS, Part


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, materialize: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.materialize = materialize
        return F.linear(rows, materialize(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients
        return (
            gradient @ ctx.materialize() if ctx.needs_input_grad[0] else None,
            None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def frozen_linear(rows: Tensor, materialize: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """``rows W^T + b`` for a matrix that is not trained.

    Args:
        rows: (N, in).
        materialize: gives ``W`` (out, in), the same at each call: in the forward, and again in the backward, so
            that autograd keeps nothing.
        bias: (out,).
    """
    return _FrozenLinearFunction.apply(rows, materialize, bias)


class FrozenLinear(nn.Linear):
    """A linear map whose weight may be packed.

    Takes over the parameters of the map it replaces. Once packed, ``weight`` is ``None``, and the weight is in the
    buffers ``weight_codes`` and ``weight_scales`` or, where it is offloaded, in host memory.
    """

    format: str | None = None  # None: ``weight`` is a parameter like any other
    offloaded: Offloaded | None = None
    dtype: torch.dtype  # of the weight, when it is made whole

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dtype = linear.weight.dtype
        self.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (out, in)."""
        return self.out_features, self.in_features

    def base(self, rows: Tensor) -> Tensor:
        """``rows W^T + b`` for rows (N, in)."""
        if self.format is None:
            return F.linear(rows, self.weight, self.bias)
        return frozen_linear(rows, self.materialize, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        output = self.base(input.reshape(-1, self.in_features))
        return output.view(*input.shape[:-1], self.out_features)

    def materialize(self) -> Tensor:
        """The weight (out, in); it may share memory with the packed one, and is to be used at once."""
        if self.format is None:
            return self.weight
        parts = self.packed() if self.offloaded is None else self.offloaded.on_device()
        return FORMATS[self.format].unpack(parts, self.shape, self.dtype)

    def packed(self) -> dict[str, Tensor]:
        """The tensors of the packed weight where they are stored, by the names they have below this module."""
        if self.offloaded is not None:
            return self.offloaded.on_host()
        names = FORMATS[self.format].parts(self.shape, self.dtype) if self.format else ()
        return {name: self.get_buffer(name) for name in names}

    def extra_repr(self) -> str:
        kept = "" if self.format is None else f", {self.format}" + (", offloaded" if self.offloaded else "")
        return super().extra_repr() + kept


@dataclass(frozen=True)
class PackReport:
    """What packing did."""

    num_matrices: int
    num_bytes: int  # of the packed matrices
    relative_rms_error: float | None  # of all their elements together, in fp32; None on fake tensors


def pack_frozen(
    model: nn.Module,
    layer_prefix: str,
    layers: Iterable[int],
    *,
    fmt: str,
    offload: bool,
    packed: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> PackReport:
    """Pack every linear map of ``layers`` whose weight is not trained; the plain weights are let go one by one.

    Args:
        layer_prefix: name of the list of layers, such as ``model.layers``.
        fmt: a key of ``FORMATS``; ``full`` without ``offload`` changes nothing.
        offload: keep the packed weights in host memory.
        packed: ``packed_state`` of an earlier model, taken as it is. By default the weights are packed anew.
        device: where the weights are needed, by default where they are. Given for a model that is still on the
            CPU, one matrix at a time is moved there, and the whole model never is.

    Raises:
        ConfigError: an unknown format.
        CheckpointMismatch: ``packed`` belongs to another model or format.
    """
    if fmt not in FORMATS:
        raise ConfigError(f"no format {fmt!r} for frozen weights. Known: {', '.join(FORMATS)}.", format=fmt)
    if fmt == "full" and not offload:
        return PackReport(0, 0, 0.0)
    found = {name: _frozen_linears(model, name) for name in (f"{layer_prefix}.{index}" for index in sorted(layers))}
    named = {layer: linears for layer, linears in found.items() if linears}
    given = None if fmt == "full" else packed
    if given is not None:
        _check_packed(given, _expected_parts(named.values(), fmt))
    where = None if device is None else torch.device(device)
    host: dict[str, Tensor] = {}
    places: list[tuple[FrozenLinear, int, dict[str, Span]]] = []
    squares: list[Tensor] = []
    for layer, linears in named.items():
        spans = lay_out(_expected_parts([linears], fmt))
        if offload:
            where = where or next(iter(linears.values())).weight.device
            host[layer] = host_buffer(spans.values(), where)
        for name, linear in linears.items():
            weight = linear.weight.detach()
            weight = weight if fmt == "full" else weight.to(where)  # a whole matrix goes to the host directly
            parts = FORMATS[fmt].pack(weight) if given is None else _own(given, name, fmt, linear, weight.device)
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
        fetcher = LayerFetcher(host, where)  # its slots take the place of the plain weights
        for linear, layer_index, own in places:
            linear.offloaded = Offloaded(fetcher, layer_index, own)
    return PackReport(
        num_matrices=len(squares),
        num_bytes=sum(span.num_bytes for span in lay_out(_expected_parts(named.values(), fmt)).values()),
        relative_rms_error=_relative_rms_error(squares),
    )


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """Codes and scales by full name, ``…q_proj.weight_codes``, as ``pack_frozen`` takes them back; not copied.

    Empty for ``full``, where ``unpacked_state`` is as exact.
    """
    return {
        f"{name}.{key}": tensor
        for name, linear in _packed_linears(model)
        if linear.format != "full"
        for key, tensor in linear.packed().items()
    }


def unpacked_state(model: nn.Module) -> Mapping[str, Tensor]:
    """The packed weights as plain ones by full name, ``…q_proj.weight``: on the CPU, each made when it is read."""
    return _UnpackedState(model)


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor that holds packed weights, and those that the offload keeps on the device: name, tensor, on host.

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


class _UnpackedState(Mapping[str, Tensor]):
    def __init__(self, model: nn.Module) -> None:
        self._linears = {f"{name}.weight": linear for name, linear in _packed_linears(model)}

    def __getitem__(self, name: str) -> Tensor:
        # A copy in any case: what is made whole may be a view of a slot that the next layer overwrites.
        return self._linears[name].materialize().to("cpu", copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


def _packed_linears(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.format is not None:
            yield name, module


def _frozen_linears(model: nn.Module, layer_name: str) -> dict[str, FrozenLinear]:
    """The linear maps of a layer whose plain weight is not trained, by full name, each able to be packed."""
    linears: dict[str, FrozenLinear] = {}
    for name, module in list(model.get_submodule(layer_name).named_modules(prefix=layer_name)):
        if not isinstance(module, nn.Linear) or module.weight is None or module.weight.requires_grad:
            continue
        if type(module) is nn.Linear:
            module = FrozenLinear(module)
            model.set_submodule(name, module)
        if isinstance(module, FrozenLinear):  # another family's own kind of linear map stays as it is
            linears[name] = module
    return linears


def _expected_parts(layers: Iterable[Mapping[str, FrozenLinear]], fmt: str) -> dict[str, Part]:
    return {
        f"{name}.{key}": part
        for linears in layers
        for name, linear in linears.items()
        for key, part in FORMATS[fmt].parts(linear.shape, linear.dtype).items()
    }


def _check_packed(given: Mapping[str, Tensor], expected: Mapping[str, Part]) -> None:
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    wrong = sorted(
        name
        for name in expected.keys() & given.keys()
        if expected[name] != (tuple(given[name].shape), given[name].dtype)
    )
    if missing or unknown or wrong:
        parts = [("missing", missing), ("unknown", unknown), ("of another shape or type", wrong)]
        told = "; ".join(f"{len(names)} {what} ({names[0]} …)" for what, names in parts if names)
        raise CheckpointMismatch(
            f"the saved packed weights are not those of this model's frozen layers: {told}. "
            "Resume with the memory.frozen_weights and the plan that the checkpoint was made with.",
            missing=missing,
            unknown=unknown,
            wrong=wrong,
        )


def _own(
    given: Mapping[str, Tensor], name: str, fmt: str, linear: FrozenLinear, device: torch.device
) -> dict[str, Tensor]:
    return {key: given[f"{name}.{key}"].to(device) for key in FORMATS[fmt].parts(linear.shape, linear.dtype)}


def _squares(weight: Tensor, restored: Tensor) -> Tensor:
    """(2,): sums of squares of the difference and of the weight."""
    rows = max(CHUNK // weight.shape[1], 1)
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
