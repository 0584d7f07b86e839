"""Model-state bytes of a stage, before any model exists."""

from __future__ import annotations

from collections.abc import Sequence

from steplm.config import MemoryConfig, OptimConfig
from steplm.errors import ConfigError
from steplm.memory.terms import OUTER_COMPONENTS, WEIGHT_BYTES, StageCounts, model_state_terms
from steplm.types import MemoryEstimate, ModelShape, TensorShape
from steplm.units import nearest


def estimate_stage(
    shape: ModelShape,
    *,
    precision: str,
    num_new_layers: int,
    num_frozen_layers: int = 0,
    num_low_rank_layers: int = 0,
    adapter_shapes: Sequence[TensorShape] = (),
    outer: str = "trained",
    outer_rank: int = 0,
    count_outer: bool = True,
    memory: MemoryConfig | None = None,
    optim: OptimConfig | None = None,
    num_shards: int = 1,
) -> MemoryEstimate:
    """Model-state bytes of one stage on the rank that has the most, which is the first; without terms of no bytes.

    Leaves out activations, logits, workspace and the device's own context: see ``steplm.memory.moments``.

    Args:
        precision: "bf16" (2 + 2 + 12 bytes a trained parameter, 2 a frozen one) or "fp32" (4 + 4 + 8, 4).
        num_new_layers: layers trained as a whole, with AdamW's states.
        num_frozen_layers: layers of which at most the adapters are trained.
        num_low_rank_layers: layers trained as a whole whose matrices have the low-rank states of ``optim``.
        adapter_shapes: of each factor in one frozen layer; see ``adapter_shapes_per_layer``.
        outer: embeddings, final norm and head are "trained", "frozen", or frozen under "adapters" of ``outer_rank``.
        count_outer: whether they are counted; without them this is the bare formula of the source.
        memory: the formats of what is held; default: as the source.
        optim: the optimizer, whose states differ; default: AdamW. ``badam`` holds what AdamW does, of the few
            layers that it trains at a time: those are the ``num_new_layers``.
        num_shards: ranks that share one copy: each tensor is cut along dimension 0.

    Source: STEP (arXiv 2504.04151), section 2.2.
    """
    if precision not in WEIGHT_BYTES:
        raise ConfigError(f"no precision {precision!r}. Known: {', '.join(WEIGHT_BYTES)}.", precision=precision)
    counts = StageCounts(
        shape=shape,
        precision=precision,
        memory=memory or MemoryConfig(),
        optim=optim or OptimConfig(),
        num_new_layers=num_new_layers,
        num_frozen_layers=num_frozen_layers,
        num_low_rank_layers=num_low_rank_layers,
        adapter_shapes=tuple(adapter_shapes),
        outer=outer if count_outer else "frozen",
        outer_rank=outer_rank,
        num_shards=num_shards,
    )
    terms = model_state_terms(counts)
    return MemoryEstimate(tuple(term for term in terms if count_outer or term.component not in OUTER_COMPONENTS))


def resolve_target_modules(shape: ModelShape, target_modules: str | Sequence[str]) -> tuple[str, ...]:
    """Last parts of the names of the linear maps to adapt, in the layer's order; "all-linear" is every one.

    Raises:
        ConfigError: a layer has no linear map of that name.
    """
    known = tuple(dict.fromkeys(_last_part(linear.name) for linear in shape.linears))
    if target_modules == "all-linear":
        return known
    for target in target_modules:
        if target not in known:
            hint = nearest(_last_part(target), known, otherwise=f" Known: {', '.join(known)}, or all-linear.")
            raise ConfigError(
                f"pet.target_modules: a {shape.model_type} layer has no linear map {target!r}.{hint}",
                target=target,
                known=known,
            )
    return tuple(name for name in known if name in target_modules)


def adapter_shapes_per_layer(
    shape: ModelShape, rank: int, target_modules: str | Sequence[str]
) -> tuple[TensorShape, ...]:
    """Shapes of the LoRA factors of one layer: ``rank × in_features`` and ``out_features × rank`` a target.

    E is the sum of their sizes.

    Source: LoRA (arXiv 2106.09685), section 4.1.

    Raises:
        ConfigError: unknown target, or a rank that is larger than a side of a target's matrix.
    """
    targets = resolve_target_modules(shape, target_modules)
    factors: list[TensorShape] = []
    for linear in shape.linears:
        if _last_part(linear.name) not in targets:
            continue
        smaller_side = min(linear.in_features, linear.out_features)
        if rank > smaller_side:
            raise ConfigError(
                f"pet.rank={rank} is larger than the smaller side, {smaller_side}, of {linear.name} "
                f"({linear.out_features} x {linear.in_features}). Set pet.rank to {smaller_side} or less, "
                f"or take {_last_part(linear.name)} out of pet.target_modules.",
                rank=rank,
                largest_rank=smaller_side,
                target=linear.name,
            )
        factors += [(rank, linear.in_features), (linear.out_features, rank)]
    return tuple(factors)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
