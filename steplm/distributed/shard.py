"""Model sharding with PyTorch's ``fully_shard``: each rank holds its rows and all-gathers a layer when it runs."""

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
    """Shard every parameter along its first dimension, in place; do nothing in a single process.

    Each layer is one FSDP group, all-gathered when it runs, in the dtype of its parameters. Parameters outside the
    layers belong to the root group, which stays gathered for the whole pass. Gradients are summed over ranks in fp32
    after each micro-batch, not averaged, because a rank's loss is its share of the global mean.

    Args:
        model: may be on the meta device (see ``fill``). Set ``requires_grad`` first, because sharding reads it.
        layer_prefix: name of the module list of layers, such as ``model.layers``.
    """
    if world.mesh is None:
        return
    mesh: Any = world.mesh if world.num_replicas > 1 else world.mesh["shard"]
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.get_submodule(layer_prefix).children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # By default the root stays gathered after the forward pass, and its parameters would not be the sharded ones.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # plain sums avoid an operation that gloo lacks
    # The loss uses the output head's weight, which is gathered only during a call of the root module.
    model.as_forward = MethodType(_call, model)
    register_fsdp_forward_method(model, "as_forward")


def _call(model: PreTrainedModel, function: Callable[[], Any]) -> Any:
    return function()


def fill(model: PreTrainedModel, rows: Mapping[str, Tensor]) -> None:
    """Load values into a sharded model that was created on the meta device.

    Args:
        rows: this rank's rows of every parameter, by name; a tied parameter is listed under its first name.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
    state = {name: _as_sharded(model.get_parameter(name), tensor) for name, tensor in rows.items()}
    model.load_state_dict(state, strict=False, assign=True)
    for name, its_first in tied.items():  # tie_weights ties the head's weight but not its adapter factors
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
    """Wrap this rank's rows as a ``DTensor`` of ``num_rows`` rows; return an unsharded tensor unchanged."""
    if world.rows.is_whole or world.mesh is None:
        return tensor
    shape = torch.Size((num_rows, *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    placements = (Replicate(), Shard(0))
    return DTensor.from_local(tensor, world.mesh, placements, run_check=False, shape=shape, stride=stride)
