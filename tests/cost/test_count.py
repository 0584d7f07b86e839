"""Known answers: what lives, what has died, and what was only a view."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from steplm.cost.count import REST, ByteCounter
from steplm.types import HOST

KIB = 1024


def kibibytes(number: int) -> Tensor:
    return torch.zeros(number * KIB, dtype=torch.uint8)


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request: pytest.FixtureRequest) -> contextlib.AbstractContextManager[object]:
    return FakeTensorMode() if request.param == "fake" else contextlib.nullcontext()


def test_bytes_count_from_birth_to_death(tensors: contextlib.AbstractContextManager[object]) -> None:
    with tensors, ByteCounter() as counter:
        first = kibibytes(3)
        second = torch.ones(256, dtype=torch.float32)
        assert counter.current_bytes == 4 * KIB
        del first
        assert counter.current_bytes == 1 * KIB
        third = second + second
        assert (counter.current_bytes, counter.peak_bytes) == (2 * KIB, 4 * KIB)
        counter.reset_peak()
        assert counter.peak_bytes == 2 * KIB
    del second, third
    assert counter.current_bytes == 0, "deaths count after the end too"


def test_views_and_updates_in_place_take_nothing(tensors: contextlib.AbstractContextManager[object]) -> None:
    with tensors, ByteCounter() as counter:
        whole = kibibytes(4)
        parts = [whole[:7], whole.view(2, -1).t(), whole.detach(), *whole.chunk(3)]
        whole.add_(1)
        torch.add(whole, 1, out=whole)
        assert counter.peak_bytes == 4 * KIB
        del whole
        assert counter.current_bytes == 4 * KIB, "a view keeps the storage"
        del parts
        assert counter.current_bytes == 0


def test_what_lived_before_counts_only_if_it_is_tracked(tensors: contextlib.AbstractContextManager[object]) -> None:
    with tensors:
        old, given = kibibytes(2), kibibytes(1)
        with ByteCounter() as counter:
            view = old.view(2, -1)
            assert counter.current_bytes == 0
            counter.track(given, "weights")
            counter.track(given[:3], "weights")
            assert counter.current_by_label == {"weights": 1 * KIB}
            del given
            assert counter.current_bytes == 0
            assert view.shape == (2, KIB)


def test_a_resized_storage_counts_at_its_new_size(tensors: contextlib.AbstractContextManager[object]) -> None:
    with tensors, ByteCounter() as counter:
        tensor = kibibytes(1)
        tensor.resize_(3 * KIB)
        assert counter.current_bytes == 3 * KIB


def test_data_that_python_gives_is_counted(tensors: contextlib.AbstractContextManager[object]) -> None:
    with tensors, ByteCounter() as counter:
        table = torch.tensor([1.0] * 256)
        assert counter.current_bytes == 1 * KIB
        assert table.shape == (256,)


def test_the_meta_device_holds_nothing(tensors: contextlib.AbstractContextManager[object]) -> None:
    with tensors, ByteCounter() as counter:
        shapeless = torch.zeros(KIB, device="meta")
        assert (shapeless + 1).is_meta
        assert counter.peak_bytes == 0


def test_labels_add_up_at_the_peak_and_the_host_is_apart(tensors: contextlib.AbstractContextManager[object]) -> None:
    with tensors, ByteCounter() as counter:
        weight = kibibytes(2)
        counter.track(weight, "weights")
        with counter.labeling(HOST):
            copy = weight.clone()
        work = kibibytes(3)
        assert counter.peak_bytes == 5 * KIB
        assert counter.peak_by_label == {"weights": 2 * KIB, HOST: 2 * KIB, REST: 3 * KIB}
        del work
        assert counter.current_by_label == {"weights": 2 * KIB, HOST: 2 * KIB}
        counter.track(copy, REST)
        assert counter.current_bytes == 4 * KIB


def test_frozen_parameters_and_gradients_freed_in_hooks(tensors: contextlib.AbstractContextManager[object]) -> None:
    def free(parameter: Tensor) -> None:
        assert parameter.grad is not None
        counter.track(parameter.grad, "gradients")
        seen.append(counter.current_by_label["gradients"])
        parameter.grad = None

    seen: list[int] = []

    with tensors:
        layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        layers[0].weight.requires_grad_(False)
        layers[1].weight.register_post_accumulate_grad_hook(free)
        with ByteCounter() as counter:
            loss = layers(torch.ones(2, 64)).sum()
            loss.backward()
            del loss
    gc.collect()
    assert seen == [64 * 64 * 4]
    assert counter.peak_bytes >= 64 * 64 * 4
    assert counter.current_bytes == 0
