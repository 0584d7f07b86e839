from __future__ import annotations

import os

import pytest
import torch

from steplm.errors import ConfigError
from steplm.models.device import resolve_device

CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in CONF:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("a_gpu")
def test_on_a_gpu_tensors_get_the_bytes_that_they_have() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert resolve_device("auto").type == "cuda"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("name", CONF)
def test_an_allocator_that_the_user_has_set_stays_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    resolve_device("cuda")
    assert {key: os.environ[key] for key in CONF if key in os.environ} == {name: "max_split_size_mb:64"}


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="use auto, cpu or cuda"):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            resolve_device("cuda")
