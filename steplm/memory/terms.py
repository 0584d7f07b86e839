"""The terms of model-state memory: one per component and kind.

A component is a group of tensors (``COMPONENTS``), a kind is what training holds of it (``KINDS``). Symbols, as in
the formulas: ``n_i`` layers added in stage i, ``N_{i-1}`` layers before it, ``P_layer`` parameters of one layer,
``E`` adapter parameters of one layer. Layers and adapters follow STEP (arXiv 2504.04151), section 2.2; embeddings,
final norm and head, which that formula leaves out, follow the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from steplm.config import MemoryConfig, OptimConfig
from steplm.memory.formats import FROZEN_FORMATS, is_low_rank, low_rank_state_bytes, state_bytes
from steplm.types import HOST, MemoryTerm, ModelShape, TensorShape, local_size

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}  # of a weight, and of its gradient
OUTER_COMPONENTS = ("embeddings", "final_norm", "head")
FETCH_SLOTS = 2  # frozen layers that the device holds where the others are in host memory


@dataclass(frozen=True)
class StageCounts:
    """All that a term may depend on."""

    shape: ModelShape
    precision: str
    memory: MemoryConfig
    optim: OptimConfig
    num_new_layers: int  # n_i; every layer that is trained as a whole with AdamW's states
    num_low_rank_layers: int  # trained as a whole too, with low-rank states
    num_frozen_layers: int  # N_{i-1}
    adapter_shapes: tuple[TensorShape, ...]  # of each factor in one frozen layer; E is the sum of their sizes
    outer: str  # embeddings, final norm and head: "trained", "frozen" or "adapters"
    outer_rank: int  # of the adapters on embeddings and head
    num_shards: int = 1  # ranks that share one copy


@dataclass(frozen=True)
class Tensors:
    """The tensors of a component: ``count`` copies of those of these shapes."""

    formula: str
    shapes: tuple[TensorShape, ...]
    low_rank_maps: tuple[tuple[int, int], ...] = ()  # rows and columns of each map with low-rank states
    count: int = 1
    trained: bool = True

    @property
    def num_parameters(self) -> int:
        return self.local_parameters(1)

    @property
    def matrices(self) -> tuple[int, ...]:
        """Parameters of each."""
        return tuple(prod(shape) for shape in self.shapes if len(shape) > 1)

    @property
    def num_in_vectors(self) -> int:
        """Parameters of all norms and biases."""
        return sum(prod(shape) for shape in self.shapes if len(shape) == 1)

    def local_parameters(self, num_shards: int) -> int:
        """On the first of the ranks that share them; see ``local_size``."""
        return self.count * sum(local_size(shape, num_shards) for shape in self.shapes)


def new_layers(counts: StageCounts) -> Tensors:
    """``n_i P_layer``, trained as a whole. STEP, section 2.2."""
    return Tensors("n_i × P_layer", counts.shape.layer_shapes, count=counts.num_new_layers)


def low_rank_layers(counts: StageCounts) -> Tensors:
    """``N_low P_layer``, trained as a whole with fewer states: GaLore (arXiv 2403.03507), APOLLO (arXiv 2412.05270)."""
    maps = low_rank_maps(counts.shape, counts.optim)
    return Tensors("N_low × P_layer", counts.shape.layer_shapes, maps, counts.num_low_rank_layers)


def low_rank_maps(shape: ModelShape, optim: OptimConfig) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each linear map of a layer that can have the low-rank states of the optimizer."""
    sides = ((linear.out_features, linear.in_features) for linear in shape.linears)
    return tuple(pair for pair in sides if optim.is_low_rank and is_low_rank(*pair, optim.state_rank))


def frozen_layers(counts: StageCounts) -> Tensors:
    """``N_{i-1} P_layer``, without gradient or state. STEP, section 2.2."""
    return Tensors("N_{i-1} × P_layer", counts.shape.layer_shapes, count=counts.num_frozen_layers, trained=False)


def adapters(counts: StageCounts) -> Tensors:
    """``N_{i-1} E``; LoRA (arXiv 2106.09685) has ``E = Σ rank (in + out)``. STEP, section 2.2."""
    return Tensors("N_{i-1} × E", counts.adapter_shapes, count=counts.num_frozen_layers)


def outer_adapters(counts: StageCounts) -> Tensors:
    """``rank (vocab_size + hidden_size)`` for the embeddings, and again for an untied head."""
    shape, rank = counts.shape, counts.outer_rank
    count = (1 + (shape.head_parameters > 0)) if counts.outer == "adapters" else 0
    return Tensors("rank × (vocab + hidden)", outer_adapter_shapes(shape, rank), count=count)


def outer_adapter_shapes(shape: ModelShape, rank: int) -> tuple[TensorShape, ...]:
    """Both factors of the adapter of the embeddings, or of the head."""
    return (rank, shape.hidden_size), (shape.vocab_size, rank)


def embeddings(counts: StageCounts) -> Tensors:
    """``vocab_size × hidden_size``; a head that shares them counts here, once."""
    return Tensors("P_embeddings", counts.shape.other_shapes("embeddings"), trained=counts.outer == "trained")


def final_norm(counts: StageCounts) -> Tensors:
    """``hidden_size`` weights of the norm above the last layer."""
    return Tensors("P_final_norm", counts.shape.other_shapes("final_norm"), trained=counts.outer != "frozen")


def head(counts: StageCounts) -> Tensors:
    """``hidden_size × vocab_size`` weights of an untied head, and its bias where it has one."""
    return Tensors("P_head", counts.shape.other_shapes("head"), trained=counts.outer == "trained")


# To add a component, write a function and add a line; the measurement names its tensors the same.
COMPONENTS: dict[str, tuple[Callable[[StageCounts], Tensors], ...]] = {
    "new_layers": (new_layers,),
    "low_rank_layers": (low_rank_layers,),
    "frozen_layers": (frozen_layers,),
    "adapters": (adapters, outer_adapters),
    "embeddings": (embeddings,),
    "final_norm": (final_norm,),
    "head": (head,),
}


def weights(counts: StageCounts, tensors: Tensors) -> tuple[int, str]:
    """Bytes and their formula: in the precision of the forward pass."""
    width = WEIGHT_BYTES[counts.precision]
    return tensors.local_parameters(counts.num_shards) * width, f"{width} B"


def gradients(counts: StageCounts, tensors: Tensors) -> tuple[int, str]:
    """Of the weights' type; none that lasts where the update is fused into the backward pass."""
    width = WEIGHT_BYTES[counts.precision]
    if not tensors.trained or counts.memory.fused_backward:
        return 0, "0 B"
    return tensors.local_parameters(counts.num_shards) * width, f"{width} B"


def optimizer(counts: StageCounts, tensors: Tensors) -> tuple[int, str]:
    """Adam's two moments (arXiv 1412.6980) and, for bf16 weights, their fp32 master copy."""
    if not tensors.trained:
        return 0, "0 B"
    master = 4 if counts.precision == "bf16" and counts.memory.master_weights else 0
    if tensors.low_rank_maps:
        return _low_rank_optimizer(counts, tensors, master)
    if counts.memory.optimizer_states == "fp32":
        return tensors.local_parameters(counts.num_shards) * (8 + master), f"{8 + master} B"
    moments = 2 * sum(state_bytes(matrix) for matrix in tensors.matrices) + 8 * tensors.num_in_vectors
    note = f"(2 × (1 + 4/256){f' + {master}' if master else ''}) B, vectors {8 + master} B"
    return tensors.count * moments + tensors.num_parameters * master, note


def _low_rank_optimizer(counts: StageCounts, tensors: Tensors, master: int) -> tuple[int, str]:
    """Low-rank states where a map's smaller side is larger than the rank; AdamW's for all else."""
    optim, rank = counts.optim, counts.optim.state_rank
    of_low_rank = master if counts.memory.master_weights is True else 0
    in_low_rank = sum(rows * columns for rows, columns in tensors.low_rank_maps)
    in_full = sum(tensors.matrices) + tensors.num_in_vectors - in_low_rank
    states = sum(low_rank_state_bytes(optim.name, *sides, rank) for sides in tensors.low_rank_maps)
    num_bytes = states + of_low_rank * in_low_rank + (8 + master) * in_full
    weights_too = f" + {of_low_rank}" if of_low_rank else ""
    note = f"(states of {optim.name}, rank {rank}{weights_too}) B, vectors {8 + master} B"
    return tensors.count * num_bytes, note


KINDS: dict[str, Callable[[StageCounts, Tensors], tuple[int, str]]] = {
    "weights": weights,
    "gradients": gradients,
    "optimizer": optimizer,
}


def model_state_terms(counts: StageCounts) -> Iterator[MemoryTerm]:
    """Every term of the model state that has bytes."""
    for component, groups in COMPONENTS.items():
        for kind, bytes_of in KINDS.items():
            for group in groups:
                tensors = group(counts)
                if component == "frozen_layers" and kind == "weights":
                    yield from _frozen_weights(counts, tensors)
                    continue
                num_bytes, per_parameter = bytes_of(counts, tensors)
                if num_bytes:
                    formula = f"{tensors.formula} × {per_parameter}{_divided(counts)}"
                    yield MemoryTerm(component, kind, num_bytes, formula, tensors.num_parameters)


def _divided(counts: StageCounts) -> str:
    return f" ÷ {counts.num_shards}, rows rounded up" if counts.num_shards > 1 else ""


def packed_layer_bytes(shape: ModelShape, memory: MemoryConfig, precision: str) -> int:
    """Bytes of the linear maps' matrices of one frozen layer, in the format that they are kept in."""
    pack = FROZEN_FORMATS.get(memory.frozen_weights, lambda rows, columns: rows * columns * WEIGHT_BYTES[precision])
    return sum(pack(linear.out_features, linear.in_features) for linear in shape.linears)


def _frozen_weights(counts: StageCounts, tensors: Tensors) -> Iterator[MemoryTerm]:
    """Weights of frozen layers: matrices may be packed, and may be in host memory; the rest is as trained."""
    memory, width = counts.memory, WEIGHT_BYTES[counts.precision]
    name, size = "frozen_layers", tensors.num_parameters
    if not size:
        return
    if not memory.packs_frozen:
        local = tensors.local_parameters(counts.num_shards)
        yield MemoryTerm(name, "weights", local * width, f"{tensors.formula} × {width} B{_divided(counts)}", size)
        return
    matrices = counts.num_frozen_layers * sum(x.in_features * x.out_features for x in counts.shape.linears)
    packed = packed_layer_bytes(counts.shape, memory, counts.precision)
    fmt = f"matrices in {memory.frozen_weights}" if memory.frozen_weights != "full" else f"matrices × {width} B"
    rest = size - matrices
    if not memory.offload_frozen:
        num_bytes = counts.num_frozen_layers * packed + rest * width
        yield MemoryTerm(name, "weights", num_bytes, f"N_{{i-1}} × ({fmt} + vectors × {width} B)", size)
        return
    if rest:
        yield MemoryTerm(name, "weights", rest * width, f"N_{{i-1}} × vectors × {width} B", rest)
    yield MemoryTerm(name, HOST, counts.num_frozen_layers * packed, f"N_{{i-1}} × {fmt}", matrices)
    slots = min(FETCH_SLOTS, counts.num_frozen_layers)
    yield MemoryTerm("fetched_layers", "weights", slots * packed, f"{slots} layers × {fmt}")
