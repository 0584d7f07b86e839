"""Build a phase's model and update rules from plain tensors.

The order is always the same: weights -> adapters -> freeze -> pack -> device -> activation checkpointing -> shard ->
compile -> update rules. When tensors are sharded across ranks, the model is created on the meta device and filled after
sharding, so no rank ever holds all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from steplm.config import RunConfig
from steplm.distributed.shard import fill, shard
from steplm.distributed.world import World
from steplm.errors import CheckpointMismatch
from steplm.growth.grow import layer_prefix_of
from steplm.models.activations import checkpoint_layers, layers_to_checkpoint
from steplm.models.build import build_model, empty_model
from steplm.models.device import move
from steplm.models.forward import check_loss
from steplm.optim.build import UpdateRules, build_rules
from steplm.optim.host import require_grad_dtype
from steplm.pet.adapters import attach, fresh_adapter_state, load_adapter_state
from steplm.pet.frozen import PackReport, frozen_tensors, pack_frozen
from steplm.pet.host_linear import fetch_slots, host_linears, offload_trained
from steplm.pet.trainable import apply_trainable
from steplm.schedule import Phase, trained_patterns
from steplm.training.step import StageLog
from steplm.types import HOST, LayerProvenance, ModelShape, TrainState


@dataclass
class PhaseStart:
    """Plain tensors and progress from which a phase starts or resumes; training keeps ``progress`` and ``log`` current.

    Weights and optimizer states are this rank's rows; adapters are whole on every rank.
    """

    hf_config: PretrainedConfig
    weights: dict[str, Tensor]
    provenance: tuple[LayerProvenance, ...]
    progress: TrainState
    adapters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    optimizer_steps: dict[str, int] = field(default_factory=dict)
    log: StageLog = field(default_factory=StageLog)
    trained_names: tuple[str, ...] | None = None  # set when resuming mid-phase
    probe_loss: float | None = None  # after growth, of the plain weights

    def forget_tensors(self) -> None:
        """Drop the tensors that the assembled model now owns or has copied."""
        self.weights, self.adapters, self.optimizer = {}, {}, {}


@dataclass
class Assembled:
    """The model and update rules of a phase."""

    model: PreTrainedModel
    rules: UpdateRules
    packing: PackReport


def assemble(
    config: RunConfig, shape: ModelShape, phase: Phase, start: PhaseStart, world: World, *, check: bool = True
) -> Assembled:
    """Build the phase's model on the device and its update rules, with optimizer states allocated.

    ``check`` compares the loss with the model's own logits, which needs real (not fake or meta) tensors.
    """
    train, memory = config.train, config.memory
    prefix = shape.layer_prefix
    model = _model(start.hf_config, start.weights, world)
    if phase.has_adapters:
        attach(model, phase, prefix, config.seed + phase.index)
        if start.adapters and world.rows.is_whole:
            load_adapter_state(model, start.adapters)
    trained = apply_trainable(model, trained_patterns(phase, shape))
    if start.trained_names is not None and set(trained) != set(start.trained_names):
        differing = sorted(set(trained) ^ set(start.trained_names))
        raise CheckpointMismatch(
            f"the checkpoint trains {len(start.trained_names)} parameters and the plan {len(trained)}; they differ in "
            f"{differing[:4]}. The plan in the run directory is not the one that made this checkpoint.",
            differing=differing,
        )
    if config.sums_in_fp32 and not memory.offload_optimizer:  # the offloaded optimizer sums them itself
        for parameter in model.parameters():
            require_grad_dtype(parameter, "train.gradient_accumulation_dtype=fp32")
            parameter.grad_dtype = torch.float32
    packing = pack_frozen(
        model,
        prefix,
        phase.frozen_layers,
        fmt=memory.frozen_weights,
        offload=memory.offload_frozen,
        device=world.device,
    )
    if memory.offload_weights:
        offload_trained(model, prefix, phase.trained_layers, world.device)
    if world.rows.is_whole:
        move(model, world.device)
    model.train()
    if train.gradient_checkpointing:
        layers = layers_to_checkpoint(train.gradient_checkpointing, phase.num_hidden_layers, phase.trained_layers)
        checkpoint_layers(model, layers, prefix)
    shard(model, world, prefix)
    if not world.rows.is_whole:
        adapters = start.adapters or fresh_adapter_state(model, config.seed + phase.index)
        fill(model, start.weights | {name: world.rows.cut(tensor) for name, tensor in adapters.items()})
    if check:
        check_loss(model, train.sequence_length)  # before compile, which would otherwise specialize on one short row
    if train.compile:
        for layer in model.get_submodule(prefix):
            layer.compile()
    rules = build_rules(config, model, phase, prefix, host_linears(model))
    if start.trained_names is not None:
        rules.load_state_dict(start.optimizer, start.optimizer_steps)
    elif start.optimizer:
        # Adapter moments can survive a restart; the factors, and therefore their master weights, are new.
        fresh = {
            key: tensor for key, tensor in rules.state_dict()[0].items() if key.endswith((".master", ".correction"))
        }
        rules.load_state_dict(fresh | start.optimizer, start.optimizer_steps, strict=False)
    return Assembled(model, rules, packing)


def packed_rows(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each tensor of frozen weights, and of fetched ones, with its component and kind as the plan lists them."""
    for name, tensor, on_host in frozen_tensors(model):
        is_staging = name.startswith("staging.")
        yield "fetched_layers" if is_staging else "frozen_layers", HOST if on_host else "weights", tensor
    yield from (("fetched_layers", "weights", slot) for slot in fetch_slots(model))


def _model(hf_config: PretrainedConfig, weights: dict[str, Tensor], world: World) -> PreTrainedModel:
    """Build the model with these weights, or on the meta device if they are only one rank's rows."""
    if world.rows.is_whole:
        return build_model(hf_config, weights)
    return empty_model(hf_config, next(iter(weights.values())).dtype)


def probe_model(
    config: RunConfig, hf_config: PretrainedConfig, weights: dict[str, Tensor], world: World
) -> PreTrainedModel:
    """Build a model from plain weights (this rank's rows) to evaluate its loss without training.

    If the config keeps layers in host memory or packs them, the full model may not fit on the device: its layers then
    stay in host memory and are fetched one at a time.
    """
    model = _model(hf_config, weights, world)
    if not world.rows.is_whole:
        shard(model, world, layer_prefix_of(weights))
        fill(model, weights)
        return model
    if config.memory.fetches_layers:
        model.requires_grad_(False)
        layers = range(hf_config.get_text_config().num_hidden_layers)
        # Not pinned: the pinned allocator caches freed memory, and a probe is short-lived.
        pack_frozen(model, layer_prefix_of(weights), layers, fmt="full", offload=True, device=world.device, pin=False)
    move(model, world.device)
    return model
