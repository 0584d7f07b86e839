"""Peak device memory of a block of code: counted tensor by tensor, or reported by the allocator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steplm.cost.count import REST, ByteCounter
from steplm.models import activations
from steplm.optim.build import UpdateRules
from steplm.pet.host_linear import host_linears
from steplm.training.assemble import packed_rows
from steplm.types import HOST

ALLOCATED = "allocated"  # kind of bytes


class CountedBytes(ByteCounter):
    """Counts the bytes of tensors by label, for a CPU and for fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks: list[RemovableHandle] = []

    def watch(self, model: nn.Module, optimizer: UpdateRules | None = None) -> None:
        for buffer in model.buffers():
            self.track(buffer, REST)
        on_host = host_linears(model)
        for name, parameter in model.named_parameters():
            if name in on_host:
                continue  # tracked below, with its gradient, as a tensor of the optimizer's host
            self.track(parameter, "weights")
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))
        for _, kind, tensor in packed_rows(model):
            self.track(tensor, kind)
        if optimizer is None:
            return
        host = optimizer.host
        if host is not None:
            host.around_updates = self.on_host
        for table in optimizer.tables():
            self.track(table, REST if host is None else HOST)
        for states in optimizer.state_tensors().values():
            for state in states.values():
                self.track(state, "optimizer" if host is None else HOST)
        for _, _, tensor in () if host is None else host.tensors():
            self.track(tensor, HOST)

    def on_host(self) -> AbstractContextManager[None]:
        """Count tensors created inside this context as host memory."""
        return self.labeling(HOST)

    def start(self, part: str) -> None:
        """Restart the peak, for a new part of the code."""
        self.reset_peak()

    def library_bytes(self) -> int:
        """Always 0: kernel-internal workspaces are not tensors."""
        return 0

    def peak(self) -> dict[str, int]:
        return self.peak_by_label

    def __enter__(self) -> Any:
        self._to_host = activations.to_host
        activations.to_host = self._copy_on_host
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        activations.to_host = self._to_host
        super().__exit__(*exception)

    def _on_gradient(self, parameter: Tensor, label: str = "gradients") -> None:
        if parameter.grad is not None:  # None if already moved to the host
            self.track(parameter.grad, label)

    def _copy_on_host(self, tensor: Tensor) -> Tensor:
        with self.labeling(HOST):
            return self._to_host(tensor)


class AllocatedBytes:
    """Reads the peak from the CUDA caching allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def watch(self, model: nn.Module, optimizer: UpdateRules) -> None:
        """Do nothing: the allocator sees everything."""

    def on_host(self) -> AbstractContextManager[None]:
        """Do nothing: the CUDA allocator does not count host memory."""
        return nullcontext()

    def start(self, part: str) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, int]:
        return {ALLOCATED: self.peak_bytes}

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def library_bytes(self) -> int:
        """Bytes of cuBLAS workspaces in the peak, which the plan does not count, measured by freeing them.

        The next matmul allocates them again.
        """
        before = torch.cuda.memory_allocated(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        return before - torch.cuda.memory_allocated(self.device)

    def __enter__(self) -> AllocatedBytes:
        return self

    def __exit__(self, *exception: object) -> None: ...


def peak_meter_for(device: torch.device) -> CountedBytes | AllocatedBytes:
    """Read the allocator on a CUDA device; count tensors elsewhere."""
    return AllocatedBytes(device) if device.type == "cuda" else CountedBytes()
