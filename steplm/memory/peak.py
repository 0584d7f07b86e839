"""The highest moments of a stage on one device."""

from __future__ import annotations

from collections.abc import Sequence

from steplm.config import DistributedConfig, MemoryConfig, OptimConfig, TrainConfig
from steplm.memory.activations import Workload, is_modelled
from steplm.memory.moments import Moments, Pass
from steplm.memory.sharded import Groups, ShardedMoments
from steplm.types import MemoryEstimate, ModelShape, PeakEstimate, TensorShape


def estimate_peak(
    shape: ModelShape,
    state: MemoryEstimate,
    *,
    train: TrainConfig,
    memory: MemoryConfig,
    optim: OptimConfig,
    num_layers: int,
    new_layers: Sequence[int],
    low_rank_layers: Sequence[int] = (),
    micro_batch_size: int,
    micro_batches: int,
    distributed: DistributedConfig | None = None,
    adapter_rank: int = 0,
    adapter_targets: tuple[str, ...] = (),
    adapter_shapes: tuple[TensorShape, ...] = (),
    outer: str = "trained",
    eval_batch_size: int | None = None,
    within_documents: bool = False,
    grows: bool = True,
) -> PeakEstimate | None:
    """The highest moments of one stage, on the first rank; None for families that ``activations`` does not count.

    Args:
        state: the stage's model state on that rank, embeddings and head counted.
        new_layers: indices of the layers that are trained as a whole.
        low_rank_layers: of these, those whose matrices have low-rank states.
        micro_batch_size: sequences of the largest micro-batch of the rank.
        micro_batches: forward passes of the rank in one step.
        distributed: the devices; default: one.
        adapter_rank, adapter_targets, adapter_shapes: of the adapters on the other layers; rank 0: they have none.
        outer: embeddings, final norm and head are "trained", "frozen" or under "adapters".
        eval_batch_size: sequences at once in an evaluation; default: those of a micro-batch.
        within_documents: attention stays inside documents, which takes a mask.
        grows: whether the stage begins with a growth.
    """
    if not is_modelled(shape):
        return None
    work = Workload(
        shape,
        train.precision,
        micro_batch_size,
        train.sequence_length,
        adapter_rank,
        adapter_targets if adapter_rank else (),
        within_documents,
    )
    of = Pass(
        work,
        state,
        train,
        memory,
        optim,
        num_layers,
        frozenset(new_layers),
        frozenset(low_rank_layers),
        outer,
        micro_batches,
        eval_batch_size or micro_batch_size,
    )
    if distributed is None or distributed.world_size == 1:
        return PeakEstimate(Moments(of).in_order(grows=grows))
    groups = Groups.of(
        shape,
        distributed,
        work.width,
        adapter_shapes=adapter_shapes if adapter_rank else (),
        outer=outer,
        outer_rank=adapter_rank,
        packs_frozen=memory.packs_frozen,
    )
    return PeakEstimate(ShardedMoments(of, groups).in_order(grows=grows))
