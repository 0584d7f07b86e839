"""Files that are hashed while they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steplm.checkpoint import hashed
from steplm.checkpoint.hashed import DTYPE_NAMES, HashedFile, write_tensors
from steplm.checkpoint.shards import fingerprint


def test_safetensors_reads_every_type_and_shape_back(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(-3, 4).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "matrix": torch.randn(5, 7).bfloat16()}
    found = write_tensors(tensors, tmp_path / "file")
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert found == fingerprint(tmp_path / "file")


def test_a_file_written_in_many_blocks_has_the_hash_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashed, "BLOCK", 7)
    with HashedFile(tmp_path / "file") as file:
        assert file.write(bytes(range(100))) == 100
        file.write(b"")
        file.write(b"end")
        found = file.fingerprint
    assert (tmp_path / "file").read_bytes() == bytes(range(100)) + b"end"
    assert found == fingerprint(tmp_path / "file")
