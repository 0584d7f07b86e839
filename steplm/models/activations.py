"""Activations of the layers in less memory: made again in the backward pass, or kept in host memory until then."""

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
    """Indices of the layers that ``train.gradient_checkpointing`` names, bottom to top.

    Args:
        choice: ``True`` all, ``False`` none, ``"new"`` those of ``new_layers``, ``"frozen"`` the others.
    """
    new = set(new_layers)
    chosen = {True: range(num_layers), False: (), "new": new, "frozen": set(range(num_layers)) - new}[choice]
    return tuple(sorted(chosen))


def checkpoint_layers(model: PreTrainedModel, layers: Sequence[int], layer_prefix: str) -> None:
    """Of these layers keep only the input, and run them again in the backward pass; of all others keep everything.

    Args:
        layer_prefix: name of the list of layers, such as ``model.layers``.

    Raises:
        ConfigError: the family's layers do not offer it.
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
        # The newer name, where transformers has it. Reentrant checkpointing gives no gradients where the
        # first layers are frozen.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # For reentrant checkpointing it makes the embeddings' output ask for a gradient, which
        # would keep activations of frozen layers that nobody needs.
        model.disable_input_require_grads()
    for index, layer in enumerate(all_layers):
        layer.gradient_checkpointing = index in layers


@contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """What autograd saves inside moves to host memory, and comes back when the backward pass asks for it.

    Parameters, buffers and storages of less than ``MIN_OFFLOADED_BYTES`` stay. A storage that is saved several
    times moves once, whole; in the backward pass it is on the device from its first use until its last.
    """
    stay = {StorageWeakRef(tensor.untyped_storage()) for tensor in chain(model.parameters(), model.buffers())}
    # The weak reference in the key keeps the address from being another storage's; the version tells what was
    # saved before a change in place from what was saved after it.
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
    """A copy in host memory; pinned, and made without waiting, where the tensor is on an accelerator."""
    on_accelerator = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_accelerator)
    return copy.copy_(tensor, non_blocking=on_accelerator)


class _Moved:
    """All elements of one storage: in host memory until somebody asks for them, then on the device."""

    def __init__(self, tensor: Tensor) -> None:
        num_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.device, self.is_on_host = tensor.device, True
        self.elements = to_host(tensor.detach().as_strided((num_elements,), (1,), 0))

    def on_device(self) -> Tensor:
        if self.is_on_host:
            # A copy on a CPU too, so that a count of bytes sees there what an accelerator does.
            self.elements = self.elements.to(self.device, non_blocking=True, copy=True)
            self.is_on_host = False
        return self.elements


class _View(NamedTuple):
    """A saved tensor: a view of a storage that was moved."""

    whole: _Moved
    size: Sequence[int]
    stride: Sequence[int]
    offset: int

    def on_device(self) -> Tensor:
        return self.whole.on_device().as_strided(self.size, self.stride, self.offset)
