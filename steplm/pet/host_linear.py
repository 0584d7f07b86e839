"""Linear layers whose trained weights stay in host memory and are fetched to the device one layer ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steplm.pet.host import LayerFetcher, Offloaded, Span, host_buffer, lay_out
from steplm.pet.packing import Part


class _HostLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, linear: HostLinear) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.linear = linear
        return F.linear(rows, linear.on_device(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (gradient,), (rows,) = gradients, ctx.saved_tensors
        to_rows = gradient @ ctx.linear.on_device() if ctx.needs_input_grad[0] else None
        to_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        ctx.linear.take_gradient(gradient.t() @ rows)
        return to_rows, None, to_bias, None


class HostLinear(nn.Linear):
    """A linear layer whose trained ``weight`` is a parameter in host memory; its bias is on the device.

    Autograd saves the layer's input but not its weight, which is fetched again for the backward pass.

    Attributes:
        fetcher: brings the weights of this and other layers to the device.
        take_gradient: receives the gradient of the weight (out, in), on the device, in each backward pass;
            ``weight.grad`` is not set.
    """

    take_gradient: Callable[[Tensor], None]

    def __init__(self, linear: nn.Linear, weight: nn.Parameter, offloaded: Offloaded) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = weight, linear.bias
        self._offloaded = offloaded
        self.train(linear.training)

    @property
    def fetcher(self) -> LayerFetcher:
        return self._offloaded.fetcher

    def on_device(self) -> Tensor:
        """The weight (out, in) on the device; valid until another layer is fetched."""
        return self._offloaded.on_device()["weight"]

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        output: Tensor = _HostLinearFunction.apply(rows, self.weight, self.bias, self)
        return output.view(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostLinear:
        """As for any module, except that the weight stays in host memory."""
        return super()._apply(lambda tensor: tensor if tensor is self.weight else fn(tensor), recurse)


def offload_trained(model: nn.Module, layer_prefix: str, layers: Iterable[int], device: torch.device) -> None:
    """Move the trained weights of all linear modules in ``layers`` to host memory.

    Args:
        layer_prefix: name of the list of layers, such as ``model.layers``.
        device: where the weights are needed.

    Raises:
        ConfigError: the system refuses to pin this much memory.
    """
    host: dict[str, Tensor] = {}
    moved: list[tuple[str, nn.Linear, nn.Parameter, int, Span]] = []
    for layer in (f"{layer_prefix}.{index}" for index in sorted(layers)):
        linears = dict(_trained_linears(model, layer))
        if not linears:
            continue
        spans = lay_out({name: Part(tuple(x.weight.shape), x.weight.dtype) for name, x in linears.items()})
        host[layer] = host_buffer(spans, device)
        for name, linear in linears.items():
            weight = spans[name].of(host[layer]).copy_(linear.weight.detach())
            moved.append((name, linear, nn.Parameter(weight), len(host) - 1, spans[name]))
            linear.weight = None  # type: ignore[assignment]
    if host:
        fetcher = LayerFetcher(host, device)  # only now, so that its slots can use the memory of the freed weights
        for name, linear, weight, index, span in moved:
            model.set_submodule(name, HostLinear(linear, weight, Offloaded(fetcher, index, {"weight": span})))


def host_linears(model: nn.Module) -> dict[str, HostLinear]:
    """The modules that ``offload_trained`` made, by the full name of their weight."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, HostLinear)}


def fetch_slots(model: nn.Module) -> Iterator[Tensor]:
    """The device memory that trained weights are fetched to."""
    for fetcher in {linear.fetcher for linear in host_linears(model).values()}:
        yield from fetcher.slots


def _trained_linears(model: nn.Module, layer: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linear modules of a layer with trained weights, by full name; a family's own subclasses stay as they are."""
    for name, module in model.get_submodule(layer).named_modules(prefix=layer):
        if type(module) is nn.Linear and module.weight.requires_grad:
            yield name, module
