"""Multi-device training: bytes that each device sends per step, and bounds on the duration of the step.

In a ring of n ranks, each rank sends (n - 1) / n of the bytes that are gathered or reduced, and twice that for an
all-reduce (Patarasuk and Yuan, doi:10.1016/j.jpdc.2008.09.002). Ranks are numbered node by node, and the ranks that
share one copy of the model are consecutive. Excludes network latency, which grows with the ring; the optimizer's
FLOPs; evaluation and checkpoints; and waiting for data.
"""

from __future__ import annotations

from dataclasses import dataclass

from steplm.config import RunConfig
from steplm.cost.devices import Device
from steplm.cost.flops import recomputed_flops_per_token, training_flops_per_token
from steplm.cost.rules import RULES
from steplm.cost.sharded import Group, Groups
from steplm.cost.terms import Subject
from steplm.schedule import Phase
from steplm.types import ModelShape

UTILIZATION = 0.4  # fraction of peak FLOP/s while computing, recomputation included
LINK_SHARE = 0.8  # fraction of a link's rate that a collective reaches
PER_NODE = 8  # devices


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends in one step."""

    all_gather: int  # weights, among the ranks that share a copy
    reduce_scatter: int  # gradients, among the same ranks
    all_reduce: int  # gradients, between copies
    update: int = 0  # matrices that the update rule needs whole, among the ranks that share a copy

    @property
    def total(self) -> int:
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.update


@dataclass(frozen=True)
class StepEstimate:
    """Estimate of one step of a phase."""

    flops: int  # per device, recomputation included
    traffic: Traffic
    compute_seconds: float
    communication_seconds: float
    num_steps: int  # in the phase

    @property
    def least_seconds(self) -> float:
        """Duration if compute and communication overlap fully."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def most_seconds(self) -> float:
        """Duration if compute and communication do not overlap at all."""
        return self.compute_seconds + self.communication_seconds


def estimate_step(
    config: RunConfig, shape: ModelShape, phase: Phase, device: Device, *, utilization: float = UTILIZATION
) -> StepEstimate:
    """Estimate one step of a phase on ``config.distributed.world_size`` devices."""
    distributed = config.distributed
    flops_per_token = training_flops_per_token(shape, phase, config.train.sequence_length)
    flops_per_token += recomputed_flops_per_token(shape, phase, config)
    flops = flops_per_token * config.step_tokens // distributed.world_size
    traffic = step_traffic(config, shape, phase)
    within = _ring_bandwidth(device, distributed.num_shards, stride=1)
    between = _ring_bandwidth(device, distributed.world_size // distributed.num_shards, stride=distributed.num_shards)
    within_copy = traffic.all_gather + traffic.reduce_scatter + traffic.update
    seconds = within_copy / within + traffic.all_reduce / between
    return StepEstimate(
        flops=flops,
        traffic=traffic,
        compute_seconds=flops / (device.flops(config.train.precision) * utilization),
        communication_seconds=seconds / LINK_SHARE,
        num_steps=phase.tokens // config.step_tokens,
    )


def step_traffic(config: RunConfig, shape: ModelShape, phase: Phase) -> Traffic:
    """Traffic of one step.

    FSDP2 gathers all weights for the forward pass and again for the backward pass, and reduces gradients in fp32 after
    each micro-batch. Of the lowest layers, which the backward pass does not reach, it gathers only the topmost again.
    """
    groups, unreached = Groups.of(config, shape, phase), phase.num_layers_without_backward
    all_groups = [*((groups.layers[role], count) for role, count in phase.groups.items()), (groups.outer, 1)]
    gathered = sum(2 * count * _gathered(group) for group, count in all_groups)
    gathered -= max(0, unreached - 1) * _gathered(groups.layers[phase.layers[0]])
    reduced = sum(count * _reduced(group) for group, count in all_groups)
    between = sum(count * _reduced_between(group) for group, count in all_groups)
    times, update = config.micro_batches, _update_bytes(Subject(config, shape, phase))
    return Traffic(times * gathered, times * reduced, times * between, update)


def _update_bytes(subject: Subject) -> int:
    """Bytes that a rank sends in the update of all layers."""
    num_bytes = 0
    for rule, tensors in subject.trained:
        if (sent_bytes := RULES[rule].sent_bytes) is not None:
            setting, (taken, _) = subject.setting(rule), tensors.by_rule(subject.config.optim)
            num_bytes += tensors.count * sum(sent_bytes(matrix, setting) for matrix in taken)
    return num_bytes


def _gathered(group: Group) -> int:
    """Bytes that a rank sends for an all-gather: ``(n - 1) / n × w P``."""
    return (group.num_shards - 1) * group.width * group.local_parameters


def _reduced(group: Group) -> int:
    """Bytes that a rank sends for a reduce-scatter: ``(n - 1) / n × 4 T``."""
    return group.reduce_input_bytes - group.reduce_input_bytes // group.num_shards


def _reduced_between(group: Group) -> int:
    """Bytes that a rank sends for an all-reduce among R copies: ``2 (R - 1) / R × 4 T / n``."""
    return 2 * (group.num_replicas - 1) * group.all_reduce_bytes // group.num_replicas


def _ring_bandwidth(device: Device, num_ranks: int, stride: int) -> float:
    """Bytes per second that each rank of a ring can send.

    Across nodes, each rank contributes its network card, so a ring with k ranks per node leaves the node at k times
    the rate of one card.
    """
    if num_ranks * stride <= PER_NODE:
        return device.bandwidth_in_node
    assert device.network_bandwidth is not None
    return min(device.bandwidth_in_node, max(1, PER_NODE // stride) * device.network_bandwidth)
