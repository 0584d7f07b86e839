"""Save activation memory: recompute activations in the backward pass, or keep them in host memory until then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from steplm.cost.formats import MIN_OFFLOADED_BYTES
from steplm.errors import ConfigError


def layers_to_checkpoint(
    choice: bool | Literal["frozen", "new"], num_layers: int, new_layers: Iterable[int]
) -> tuple[int, ...]:
    """Indices of the layers that ``train.gradient_checkpointing`` selects, bottom to top.

    Args:
        choice: True for all, False for none, ``"new"`` for ``new_layers``, ``"frozen"`` for the others.
    """
    new = set(new_layers)
    chosen = {True: range(num_layers), False: (), "new": new, "frozen": set(range(num_layers)) - new}[choice]
    return tuple(sorted(chosen))


def checkpoint_layers(model: PreTrainedModel, layers: Sequence[int], layer_prefix: str) -> None:
    """Enable activation checkpointing for these layers and disable it for all others.

    Args:
        layer_prefix: name of the module list of layers, such as ``model.layers``.

    Raises:
        ConfigError: the layers of this model family do not support it.
    """
    all_layers = list(model.get_submodule(layer_prefix).children())
    for layer in all_layers:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ConfigError(
                f"the layers of model_type {model.config.model_type!r} ({type(layer).__name__}) cannot be checkpointed "
                "one by one. Set train.gradient_checkpointing=false.",
                model_type=model.config.model_type,
            )
    if layers:
        # Newer transformers versions have the first name. Reentrant checkpointing gives no gradients if the
        # first layers are frozen.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # transformers makes the embedding output require gradients, which only reentrant checkpointing needs. That
        # would save activations of frozen layers that are never used.
        model.disable_input_require_grads()
    for index, layer in enumerate(all_layers):
        layer.gradient_checkpointing = index in layers


@contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """Move tensors that autograd saves to host memory, and back when the backward pass needs them.

    Parameters, buffers, and storages smaller than ``MIN_OFFLOADED_BYTES`` stay on the device. A storage that is saved
    several times is moved once, as a whole. In the backward pass it is on the device from its first use to its last.
    """
    stay = {StorageWeakRef(tensor.untyped_storage()) for tensor in chain(model.parameters(), model.buffers())}
    # The weak reference in the key prevents another storage from reusing the address. The version distinguishes
    # tensors saved before and after an in-place change.
    moved: WeakValueDictionary[tuple[StorageWeakRef, int, torch.dtype], _Moved] = WeakValueDictionary()

    def pack(tensor: Tensor) -> Tensor | _View:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if storage.nbytes() < MIN_OFFLOADED_BYTES or reference in stay:
            return tensor
        key = (reference, tensor._version, tensor.dtype)
        whole = moved.get(key)
        if whole is None:
            whole = moved[key] = _Moved(tensor)
        return _View(whole, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(saved: Tensor | _View) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.on_device()

    with saved_tensors_hooks(pack, unpack):
        yield


def to_host(tensor: Tensor) -> Tensor:
    """Copy to host memory; from an accelerator, asynchronously to pinned memory."""
    on_accelerator = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_accelerator)
    return copy.copy_(tensor, non_blocking=on_accelerator)


class _Moved:
    """All elements of one storage, in host memory until first requested, then on the device."""

    def __init__(self, tensor: Tensor) -> None:
        num_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.device, self.is_on_host = tensor.device, True
        self.elements = to_host(tensor.detach().as_strided((num_elements,), (1,), 0))

    def on_device(self) -> Tensor:
        if self.is_on_host:
            # Copy on a CPU too, so that counting bytes there matches an accelerator.
            self.elements = self.elements.to(self.device, non_blocking=True, copy=True)
            self.is_on_host = False
        return self.elements


class _View(NamedTuple):
    """A saved tensor, as a view of a moved storage."""

    whole: _Moved
    size: Sequence[int]
    stride: Sequence[int]
    offset: int

    def on_device(self) -> Tensor:
        return self.whole.on_device().as_strided(self.size, self.stride, self.offset)
