"""Bytes transferred between a device and its host in one step, by direction."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from steplm.config import RunConfig
from steplm.cost.rules import RULES
from steplm.cost.terms import FETCH_SLOTS, Subject
from steplm.schedule import Phase
from steplm.types import ModelShape


@dataclass(frozen=True)
class Transfers:
    """Bytes per optimizer step and device; excludes transfers of frozen weights and activations."""

    to_host: int
    to_device: int


NO_TRANSFERS = Transfers(0, 0)


def host_transfers(config: RunConfig, shape: ModelShape, phase: Phase) -> Transfers:
    """Transfers of ``memory.offload_optimizer``: per micro-batch ``w T`` of gradients to the host, then ``w T`` back.

    Muon, which runs its matmuls on the device, also sends its matrices there before the update and gets them back.
    With ``memory.offload_weights``, matrices of trained layers are fetched in each pass instead of sent back once.
    Source: ZeRO-Offload (arXiv 2101.06840), section 4.1.
    """
    if not config.memory.offload_optimizer:
        return NO_TRANSFERS
    subject = Subject(config, shape, phase)
    trained = products = 0
    for rule, tensors in subject.trained:
        trained += subject.width * tensors.num_parameters
        if RULES[rule].product_bytes is not None:
            taken, _ = tensors.by_rule(config.optim)
            products += tensors.count * subject.setting(rule).compute_width * sum(map(prod, taken))
    sent = trained
    if config.memory.offload_weights:
        sent -= subject.width * len(phase.trained_layers) * shape.linear_weights
    to_device = sent + products + fetched_bytes(config, shape, phase)
    return Transfers(to_host=config.micro_batches * trained + products, to_device=to_device)


def fetched_bytes(config: RunConfig, shape: ModelShape, phase: Phase) -> int:
    """Bytes of trained layers fetched to the device in one step, with ``memory.offload_weights``.

    Every micro-batch goes up the layers and down again. When the direction changes, the last ``FETCH_SLOTS`` layers are
    still on the device.
    """
    if not config.memory.offload_weights:
        return 0
    num_layers = len(phase.trained_layers)
    kept = min(FETCH_SLOTS, num_layers)
    num_fetches = kept + 2 * config.micro_batches * (num_layers - kept)
    return num_fetches * shape.linear_weights * Subject(config, shape, phase).width
