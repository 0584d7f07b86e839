"""Files that are hashed while they are written, so that they need not be read again."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

Fingerprint = dict[str, Any]  # size and sha256 of a file
BLOCK = 1 << 26  # bytes written and then hashed at a time

# Dtype names of the safetensors format: https://huggingface.co/docs/safetensors
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


class HashedFile(io.FileIO):
    """A file written sequentially and hashed along the way."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self._digest, self._num_bytes = hashlib.sha256(), 0

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            num_bytes = super().write(view[done : done + BLOCK])
            self._digest.update(view[done : done + num_bytes])
            done += num_bytes
        self._num_bytes += done
        return done

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of everything written so far; works on a closed file too."""
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}


class HashingFileSystem(FileSystem):
    """File system for PyTorch's distributed checkpointing that fingerprints the files it writes, by name."""

    def __init__(self) -> None:
        self.fingerprints: dict[str, Fingerprint] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with HashedFile(Path(path)) as file:
            yield file
            self.fingerprints[Path(path).name] = file.fingerprint


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> Fingerprint:
    """Write contiguous CPU tensors as a safetensors file, directly from their memory.

    Raises:
        KeyError: a dtype is not in ``DTYPE_NAMES``.
    """
    # Larger elements first, so that every tensor is aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        stop = start + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                file.write(tensor.detach().reshape(-1).view(torch.uint8).numpy())
        return file.fingerprint
