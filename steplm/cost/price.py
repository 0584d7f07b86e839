"""What a phase holds and computes: a function of the phase and of the configuration that it runs under."""

from __future__ import annotations

from dataclasses import dataclass

from steplm.config import RunConfig
from steplm.cost.activations import is_modelled
from steplm.cost.flops import recomputed_flops_per_token, training_flops_per_token
from steplm.cost.peak import Instants
from steplm.cost.sharded import ShardedInstants
from steplm.cost.terms import model_state
from steplm.cost.transfers import NO_TRANSFERS, Transfers, optimizer_transfers
from steplm.schedule import Phase
from steplm.types import MemoryEstimate, ModelShape, PeakEstimate


@dataclass(frozen=True)
class Cost:
    """Of one phase, on one device."""

    memory: MemoryEstimate  # the model state
    peak: PeakEstimate | None  # all that the device holds; None where the family's layers are not known
    flops_per_token: int  # of training, without what is computed again
    recomputed_flops_per_token: int  # of activations that are computed again
    transfers: Transfers = NO_TRANSFERS  # of the optimizer's tensors, between device and host

    @property
    def device_bytes(self) -> int:
        """The peak, or the model state where no more is known."""
        return self.memory.total_bytes if self.peak is None else self.peak.total_bytes

    @property
    def host_bytes(self) -> int:
        """The most in host memory at once, or that of the model state where no more is known."""
        return self.memory.host_bytes if self.peak is None else self.peak.host_bytes


def price(config: RunConfig, shape: ModelShape, phase: Phase) -> Cost:
    """Bytes and FLOPs of a phase; tokens and learning rates do not change them."""
    state = model_state(config, shape, phase)
    counts_outer = config.plan.count_embeddings
    return Cost(
        memory=state if counts_outer else model_state(config, shape, phase, count_outer=False),
        peak=peak(config, shape, phase, state),
        flops_per_token=training_flops_per_token(shape, phase, config.train.sequence_length),
        recomputed_flops_per_token=recomputed_flops_per_token(shape, phase, config),
        transfers=optimizer_transfers(config, shape, phase),
    )


def peak(
    config: RunConfig, shape: ModelShape, phase: Phase, state: MemoryEstimate | None = None
) -> PeakEstimate | None:
    """All bytes on the device at the instants that can be the highest; None for families not modelled.

    Args:
        state: the model state, where it is known already.
    """
    if not is_modelled(shape):
        return None
    instants = Instants if config.distributed.world_size == 1 else ShardedInstants
    # Before a growth and after a merge the loss of the plain weights is taken.
    return PeakEstimate(instants(config, shape, phase, state).in_order(grows=phase.entry.kind in ("grow", "merge")))
