"""Memory and compute cost of a phase under a given configuration."""

from __future__ import annotations

from dataclasses import dataclass

from steplm.config import RunConfig
from steplm.cost.activations import is_modeled
from steplm.cost.flops import recomputed_flops_per_token, training_flops_per_token
from steplm.cost.peak import Instants
from steplm.cost.sharded import ShardedInstants
from steplm.cost.terms import model_state
from steplm.cost.transfers import NO_TRANSFERS, Transfers, host_transfers
from steplm.schedule import Phase
from steplm.types import MemoryEstimate, ModelShape, PeakEstimate


@dataclass(frozen=True)
class Cost:
    """Cost of one phase on one device."""

    memory: MemoryEstimate  # the model state
    peak: PeakEstimate | None  # all device memory; None for families that are not modeled
    flops_per_token: int  # of training, without recomputation
    recomputed_flops_per_token: int  # of recomputed activations
    transfers: Transfers = NO_TRANSFERS  # of gradients and weights between device and host, for the optimizer

    @property
    def device_bytes(self) -> int:
        """The peak, or the model state if the peak is unknown."""
        return self.memory.total_bytes if self.peak is None else self.peak.total_bytes

    @property
    def host_bytes(self) -> int:
        """Peak host memory, or that of the model state if the peak is unknown."""
        return self.memory.host_bytes if self.peak is None else self.peak.host_bytes


def price(config: RunConfig, shape: ModelShape, phase: Phase) -> Cost:
    """Memory and FLOPs of a phase; they do not depend on its tokens or learning rate."""
    state, peak = model_state(config, shape, phase), None
    if is_modeled(shape):
        instants = Instants if config.distributed.world_size == 1 else ShardedInstants
        evaluates_first = phase.entry.kind in ("grow", "merge")  # the loss, on the plain weights
        peak = PeakEstimate(instants(config, shape, phase, state).in_order(grows=evaluates_first))
    return Cost(
        memory=state if config.plan.count_embeddings else model_state(config, shape, phase, count_outer=False),
        peak=peak,
        flops_per_token=training_flops_per_token(shape, phase, config.train.sequence_length),
        recomputed_flops_per_token=recomputed_flops_per_token(shape, phase, config),
        transfers=host_transfers(config, shape, phase),
    )
