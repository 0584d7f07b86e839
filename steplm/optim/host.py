"""Trained parameters in host memory, where update rules act on them: gradients go there, and new weights come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steplm.cost.formats import STEP_CHUNK
from steplm.errors import ConfigError
from steplm.pinned import host_empty
from steplm.types import HOST_GRADIENTS, HOST_WEIGHTS


class Fetcher(Protocol):
    """Copies weights from host memory to the device."""

    def forget(self) -> None:
        """Fetch every weight anew from now on."""


class FetchesWeight(Protocol):
    """A module whose trained weight is in host memory; see ``steplm.pet.host_linear.HostLinear``."""

    take_gradient: Callable[[Tensor], None]

    @property
    def fetcher(self) -> Fetcher: ...


class HostParameters:
    """Host-memory copies of the parameters that are trained on a device, and parameters that are in host memory anyway.

    As soon as a gradient is complete, it leaves the device and is added to those of earlier micro-batches; the
    parameter's ``.grad`` is None again. While it is in transfer, until the next gradient is complete or the pass ends,
    it still occupies device memory. On CUDA a separate stream copies, and a thread adds, while the backward pass
    continues.

        loss.backward()
        host.wait()         # now ``parameters`` have gradients
        rule.step(…)        # updates ``parameters`` from gradients on the host
        host.send(names)

    To update a parameter while the backward pass continues, as soon as its last gradient has arrived:

        with host.calling(update_and_send):
            loss.backward()  # of the last micro-batch

    To update parameters during the next pass, whose gradients wait for the updates of their parameters:

        host.update_later(update)
        …                   # the next pass, with the old weights
        host.finish_updates()

    Source: ZeRO-Offload (arXiv 2101.06840), section 4; there the device sums the gradients.

    Args:
        device: where the parameters are.
        sums: whether several gradients arrive before an update. They are then summed in fp32; otherwise a gradient
            keeps its dtype.
        linears: modules whose weights are in host memory already, by the full name of the weight: these weights are
            updated themselves, and the modules fetch them.

    Attributes:
        parameters: the copies, by name; ``.grad`` is None until a gradient has arrived.
        bytes_to_host, bytes_to_device: total bytes transferred; for tests.
        around_updates: makes a context for the updates of ``calling``; for counts of memory.
    """

    def __init__(self, device: torch.device, *, sums: bool, linears: Mapping[str, FetchesWeight] | None = None) -> None:
        self.device, self.sums = device, sums
        self.around_updates: Callable[[], AbstractContextManager[None]] = nullcontext
        self._linears = linears or {}
        self._call: Callable[[str], None] | None = None
        self._calls: list[Future[None]] = []
        self._updates: dict[str, Future[None]] = {}  # of ``update_later``, until something has waited for them
        self._unsent: set[str] = set()  # names of weights that are newer here than on the device
        self._updater = ThreadPoolExecutor(max_workers=1, thread_name_prefix="updates")
        self.parameters: dict[str, nn.Parameter] = {}
        self.bytes_to_host = self.bytes_to_device = 0
        self._on_device: dict[str, nn.Parameter] = {}
        self._gradients: dict[str, Tensor] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._landing: Tensor | None = None  # receives a gradient before it is added to the sum
        self._leaving: Tensor | None = None  # the gradient in transfer
        self._arrived: torch.cuda.Event | None = None  # the end of that transfer
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gradients")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def set_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Hold copies of these parameters from now on; existing copies stay as they are.

        Raises:
            ConfigError: PyTorch is too old for fp32 gradients of bf16 parameters, or memory cannot be pinned.
        """
        self.wait()
        for name in self.parameters.keys() - parameters.keys():
            self._hooks.pop(name).remove()
            del self.parameters[name], self._gradients[name], self._on_device[name]
        for name, parameter in parameters.items():
            if name not in self.parameters:
                self._add(name, parameter)
        self.parameters = {name: self.parameters[name] for name in parameters}
        largest = max((p.nbytes for p in parameters.values()), default=0)
        if self.sums and (self._landing is None or len(self._landing) != largest):
            self._landing = host_empty((largest,), torch.uint8, self.device)

    def wait(self) -> None:
        """Wait until all gradients that left the device have been added to their sums."""
        self._let_go()
        if self._pending is not None:
            self._pending.result()
        self._pending = None

    @contextmanager
    def calling(self, update: Callable[[str], None]) -> Iterator[None]:
        """Inside this context, call ``update`` with a parameter's name once its gradient has been added to the sum.

        On CUDA, a separate thread makes the calls, one after the other; the backward pass does not wait for them.
        ``update`` sets the gradient to None.
        """
        self.wait()
        self._call = update
        try:
            yield
            self.wait()
            for call in self._calls:
                call.result()
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:  # earlier passes gave it a gradient, and this one did not
                    update(name)
        finally:
            self._call, self._calls = None, []
            self._forget_fetched()

    def update_later(self, update: Callable[[str], None]) -> None:
        """Call ``update`` with the name of every parameter that has a gradient, and leave the device's weights alone.

        On CUDA a separate thread makes the calls, in the order in which a backward pass needs the memory of the
        gradients again. ``update`` sets the gradient to None.
        """
        if self._stream is not None:
            sent = torch.cuda.Event()
            sent.record(torch.cuda.current_stream(self.device))
            self._updater.submit(sent.synchronize)  # weights may still be on their way to the device
        for name in reversed(self.parameters):
            if self.parameters[name].grad is None:
                continue
            self._unsent.add(name)
            if self._stream is None:
                with self.around_updates():
                    update(name)
            else:
                self._updates[name] = self._updater.submit(update, name)

    def wait_for_updates(self) -> None:
        """Wait for the updates of ``update_later``."""
        for name in list(self._updates):
            self._updates.pop(name).result()

    def finish_updates(self) -> None:
        """Wait for the updates of ``update_later``, and send their weights to the device."""
        self.send(self.unsent())
        self._unsent.clear()

    def unsent(self) -> dict[str, Tensor]:
        """Weights that are newer here than on the device, by name, after waiting for their updates."""
        self.wait_for_updates()
        return {name: self.parameters[name].detach() for name in sorted(self._unsent)}

    def load_unsent(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from the result of ``unsent``."""
        for name, weight in weights.items():
            self.parameters[name].detach().copy_(weight)
        self._unsent = set(weights)

    def zero_grad(self) -> None:
        """Free every gradient, except those that ``update_later`` still needs."""
        self.wait()
        for name in self.parameters.keys() - self._updates.keys():
            self.parameters[name].grad = None

    @torch.no_grad()
    def send(self, names: Iterable[str]) -> None:
        """Make the device use the new values of these weights; on CUDA, ordered before work that is launched later."""
        for name in names:
            if name in self._on_device:
                self._on_device[name].copy_(self.parameters[name], non_blocking=True)
                self.bytes_to_device += self.parameters[name].nbytes
        if self._call is None:  # else at the end of the pass, which still uses the layers on the device
            self._forget_fetched()

    def tensors(self) -> Iterator[tuple[str | None, str, Tensor]]:
        """All tensors held: parameter name (None for the receive buffer of gradients), kind in the plan, tensor."""
        for name, parameter in self.parameters.items():
            yield name, HOST_WEIGHTS, parameter.detach()
            yield name, HOST_GRADIENTS, self._gradients[name]
        if self._landing is not None:
            yield None, HOST_GRADIENTS, self._landing

    def _add(self, name: str, parameter: nn.Parameter) -> None:
        linear = self._linears.get(name)
        copy = parameter
        if linear is None:
            copy = nn.Parameter(host_empty(parameter.shape, parameter.dtype, self.device).copy_(parameter.detach()))
        dtype = torch.float32 if self.sums else parameter.dtype
        if dtype != parameter.dtype:
            require_grad_dtype(copy, "memory.offload_optimizer with several micro-batches")
            copy.grad_dtype = dtype
        self.parameters[name] = copy
        # With sums, gradients are received in a buffer of their own, and the sums need no pinned memory.
        self._gradients[name] = host_empty(parameter.shape, dtype, torch.device("cpu") if self.sums else self.device)
        if linear is not None:
            linear.take_gradient = partial(self._take, name)
        else:
            self._on_device[name] = parameter
            self._hooks[name] = parameter.register_post_accumulate_grad_hook(partial(self._leave, name=name))

    def _forget_fetched(self) -> None:
        for fetcher in {linear.fetcher for linear in self._linears.values()}:
            fetcher.forget()

    def _leave(self, parameter: Tensor, *, name: str) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._take(name, gradient)

    @torch.no_grad()
    def _take(self, name: str, gradient: Tensor) -> None:
        """Move a gradient to the host; called during the backward pass."""
        if self._leaving is None:  # the first gradient of this pass
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)
        self.wait()  # so that at most two gradients are on the device, one of them in transfer
        if name in self._updates:
            self._updates.pop(name).result()
        copy, total = self.parameters[name], self._gradients[name]
        arrived = total
        if self._landing is not None:
            arrived = self._landing[: gradient.nbytes].view(gradient.dtype).view(gradient.shape)
        is_first, copy.grad = copy.grad is None, total
        self._leaving = gradient
        self.bytes_to_host += gradient.nbytes
        if self._stream is None:
            arrived.copy_(gradient)
            self._take_in(name, arrived, is_first)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            arrived.copy_(gradient, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(self._stream)
        self._pending = self._worker.submit(self._take_in, name, arrived, is_first, self._arrived)

    def _let_go(self) -> None:
        """Free the gradient in transfer once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self._leaving = self._arrived = None

    def _take_in(self, name: str, arrived: Tensor, is_first: bool, event: torch.cuda.Event | None = None) -> None:
        if event is not None:
            event.synchronize()
        total = self._gradients[name]
        if arrived is not total:
            self._sum(total, arrived, is_first)
        if self._call is not None and event is not None:
            self._calls.append(self._updater.submit(self._call, name))
        elif self._call is not None:
            with self.around_updates():
                self._call(name)

    @staticmethod
    def _sum(total: Tensor, arrived: Tensor, is_first: bool) -> None:
        # In chunks, because a CPU makes an fp32 copy of a bf16 tensor before it adds it to an fp32 one.
        for piece, more in zip(total.view(-1).split(STEP_CHUNK), arrived.view(-1).split(STEP_CHUNK), strict=True):
            if is_first:
                piece.copy_(more)
            else:
                piece.add_(more)


def require_grad_dtype(parameter: nn.Parameter, option: str) -> None:
    """Require a PyTorch version whose gradients can have a different dtype from their parameters.

    Raises:
        ConfigError: the version is too old; the message names ``option``, which needs it.
    """
    if not hasattr(parameter, "grad_dtype"):
        raise ConfigError(f"{option} needs PyTorch 2.10 or newer: update it.")
