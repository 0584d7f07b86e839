"""A phase's model and update rules from plain tensors.

One order, everywhere: weights -> adapters -> freeze -> pack -> device -> activation checkpointing -> shard ->
compile -> update rules. Where tensors are cut over ranks, the model is made without values, and filled when it is
sharded: no rank ever holds all of it.
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
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.growth.grow import layer_prefix_of
from steplm.models.activations import checkpoint_layers, layers_to_checkpoint
from steplm.models.build import build_model, empty_model
from steplm.models.device import move
from steplm.models.forward import check_loss
from steplm.optim.build import UpdateRules, build_rules
from steplm.pet.adapters import attach, fresh_adapter_state, load_adapter_state
from steplm.pet.frozen import PackReport, frozen_tensors, pack_frozen
from steplm.pet.trainable import apply_trainable
from steplm.schedule import Phase, trained_patterns
from steplm.types import HOST, LayerProvenance, ModelShape, SourceLoss, TrainState


@dataclass
class PhaseStart:
    """Plain tensors and progress with which a phase begins, or goes on after a resume.

    Of weights and optimizer states a rank has its rows, of adapters all.
    """

    hf_config: PretrainedConfig
    weights: dict[str, Tensor]
    provenance: tuple[LayerProvenance, ...]
    progress: TrainState
    adapters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    optimizer_steps: dict[str, int] = field(default_factory=dict)
    unlogged_losses: tuple[float, ...] = ()
    unlogged_sources: tuple[SourceLoss, ...] = ()
    trained_names: tuple[str, ...] | None = None  # at a resume in the middle of the phase
    probe_loss: float | None = None  # after a growth, of the plain weights

    def forget_tensors(self) -> None:
        """Let go of what an assembled model holds or has copied."""
        self.weights, self.adapters, self.optimizer = {}, {}, {}


@dataclass
class Assembled:
    """What a phase trains with."""

    model: PreTrainedModel
    rules: UpdateRules
    packing: PackReport


def assemble(
    config: RunConfig, shape: ModelShape, phase: Phase, start: PhaseStart, world: World, *, check: bool = True
) -> Assembled:
    """The phase's model on the device and its update rules, states allocated.

    ``check`` compares the loss with the model's own logits; it needs real numbers.
    """
    train, memory = config.train, config.memory
    prefix = layer_prefix_of(start.weights)
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
    if config.sums_in_fp32 and not memory.offload_optimizer:  # which sums them itself
        _sum_gradients_in_fp32(model)
    packing = pack_frozen(
        model,
        prefix,
        phase.frozen_layers,
        fmt=memory.frozen_weights,
        offload=memory.offload_frozen,
        device=world.device,
    )
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
        check_loss(model, train.sequence_length)  # before compile: it would compile for one short row
    if train.compile:
        for layer in model.get_submodule(prefix):
            layer.compile()
    rules = build_rules(config, model, phase, prefix)
    if start.trained_names is not None:
        rules.load_state_dict(start.optimizer, start.optimizer_steps)
    elif start.optimizer:
        # The moments of adapters can outlive a restart; their factors, and so the master weights, are fresh.
        fresh = {
            key: tensor for key, tensor in rules.state_dict()[0].items() if key.endswith((".master", ".correction"))
        }
        rules.load_state_dict(fresh | start.optimizer, start.optimizer_steps, strict=False)
    return Assembled(model, rules, packing)


def _sum_gradients_in_fp32(model: nn.Module) -> None:
    """Let autograd add every gradient to an fp32 sum.

    Raises:
        ConfigError: this version of PyTorch cannot.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "grad_dtype"):
            raise ConfigError("train.gradient_accumulation_dtype=fp32 needs PyTorch 2.10 or newer: update it.")
        parameter.grad_dtype = torch.float32


def packed_rows(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Packed weights in the rows of the plan: component, kind, tensor."""
    for name, tensor, on_host in frozen_tensors(model):
        is_staging = name.startswith("staging.")
        yield "fetched_layers" if is_staging else "frozen_layers", HOST if on_host else "weights", tensor


def _model(hf_config: PretrainedConfig, weights: dict[str, Tensor], world: World) -> PreTrainedModel:
    """With these weights; on the meta device where they are a rank's rows."""
    if world.rows.is_whole:
        return build_model(hf_config, weights)
    return empty_model(hf_config, next(iter(weights.values())).dtype)


def probe_model(
    config: RunConfig, hf_config: PretrainedConfig, weights: dict[str, Tensor], world: World
) -> PreTrainedModel:
    """A model of plain weights, of which a rank has its rows, for a loss without training.

    Where frozen weights are packed, the whole model may be too large for the device: its layers then stay in host
    memory and are fetched one after the other.
    """
    model = _model(hf_config, weights, world)
    if not world.rows.is_whole:
        shard(model, world, layer_prefix_of(weights))
        fill(model, weights)
        return model
    if config.memory.packs_frozen:
        model.requires_grad_(False)
        layers = range(hf_config.get_text_config().num_hidden_layers)
        # Not pinned: the pinned allocator keeps what is freed, and a probe is short.
        pack_frozen(model, layer_prefix_of(weights), layers, fmt="full", offload=True, device=world.device, pin=False)
    move(model, world.device)
    return model
