"""Host memory that a GPU can copy from and to while it computes."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from steplm.errors import ConfigError
from steplm.units import format_bytes


def host_empty(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor in host memory for transfers from and to ``device``; pinned if that is a GPU.

    Raises:
        ConfigError: the system refuses to pin this much memory.
    """
    return pinned(tuple(shape), dtype) if device.type == "cuda" else torch.empty(tuple(shape), dtype=dtype)


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate a tensor in pinned host memory, of exactly the requested size.

    PyTorch's own allocator of pinned memory rounds each tensor up to a power of two.

    Raises:
        ConfigError: the system refuses to pin this much memory.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype)  # separate pages, which nothing else pins
    cudart, address = torch.cuda.cudart(), tensor.data_ptr()
    code = int(cudart.cudaHostRegister(address, num_bytes, 0))
    if code:
        raise ConfigError(
            f"the system refuses to pin {format_bytes(num_bytes)} of host memory (CUDA error {code}): free host "
            "memory, raise the limit of locked memory (ulimit -l), or leave memory.offload_* out."
        )
    weakref.finalize(tensor.untyped_storage(), cudart.cudaHostUnregister, address).atexit = False
    return tensor.view(shape)
