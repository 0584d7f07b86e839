"""A model cut over the ranks by PyTorch's ``fully_shard``: each holds its rows, and gathers a layer when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from steplm.distributed.world import World


def shard(model: PreTrainedModel, world: World, layer_prefix: str) -> None:
    """Shard every parameter along its first dimension, in place; alone, nothing is done.

    Each layer is a group that is gathered when it runs, in its parameters' own type; what is outside the layers is
    the root's, gathered for the whole pass. Gradients are summed over ranks, in fp32, after each micro-batch: a
    rank's loss is its share of the global mean.

    Args:
        model: its trained parameters chosen: sharding reads ``requires_grad``. May be on the meta device; see ``fill``.
        layer_prefix: name of the list of layers, such as ``model.layers``.
    """
    if world.mesh is None:
        return
    mesh: Any = world.mesh if world.num_replicas > 1 else world.mesh["shard"]
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.get_submodule(layer_prefix).children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # By default the root stays gathered after a forward pass, and its parameters would not be the sharded ones.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a factor of one needs no operation that gloo lacks
    # The loss takes the head's matrix, which is gathered only inside a call of the root.
    model.as_forward = MethodType(_call, model)
    register_fsdp_forward_method(model, "as_forward")


def _call(model: PreTrainedModel, function: Callable[[], Any]) -> Any:
    return function()


def fill(model: PreTrainedModel, rows: Mapping[str, Tensor]) -> None:
    """Give a sharded model, made on the meta device, its values.

    Args:
        rows: of every parameter, by name, those on this rank. A tied parameter goes by its first name.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
    state = {name: _as_sharded(model.get_parameter(name), tensor) for name, tensor in rows.items()}
    model.load_state_dict(state, strict=False, assign=True)
    for name, its_first in tied.items():  # tie_weights knows the head's matrix, not the factors of its adapter
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, model.get_parameter(its_first))


def _as_sharded(parameter: Any, rows: Tensor) -> DTensor:
    return DTensor.from_local(
        rows.to(device=parameter.device_mesh.device_type, dtype=parameter.dtype),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def as_global(tensor: Tensor, world: World, num_rows: int) -> Tensor:
    """Rows on this rank as the part of a tensor of ``num_rows`` rows that they are; a whole tensor as it is."""
    if world.rows.is_whole or world.mesh is None:
        return tensor
    shape = torch.Size((num_rows, *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    placements = (Replicate(), Shard(0))
    return DTensor.from_local(tensor, world.mesh, placements, run_check=False, shape=shape, stride=stride)
