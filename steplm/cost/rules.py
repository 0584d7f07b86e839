"""The planner's view of update rules: supported matrices, state and workspace bytes, compatible options. No torch.

To add a rule, add an entry here and its class in ``steplm.optim.build``. Every run compares the bytes of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

from steplm.config import MemoryConfig, OptimConfig
from steplm.cost.formats import (
    NO_BLOCKS,
    RowBlocks,
    is_low_rank,
    low_rank_state_bytes,
    low_rank_step_bytes,
    momentum_bytes,
    muon_product_bytes,
    muon_step_bytes,
    scale_step_bytes,
)
from steplm.types import ModelShape, TensorShape

ADAMW = "adamw"  # updates whatever no other rule takes: vectors, embeddings, head


@dataclass(frozen=True)
class Setting:
    """What determines the bytes of a rule, apart from the shapes."""

    optim: OptimConfig
    states: str  # format of the states: "fp32", "8bit"
    masters: str  # master weights of bf16 weights: "fp32", "8bit" or "none"; "fp32" for fp32 weights
    width: int  # bytes per weight
    compute_width: int = 4  # bytes per element in Newton–Schulz: 2 on CUDA
    num_shards: int = 1  # ranks that share the rows of a matrix
    row_blocks: RowBlocks = field(default_factory=dict)  # see ``row_blocks``


@dataclass(frozen=True)
class Rule:
    """An update rule. Shapes are those of whole matrices; bytes are per rank.

    ``takes(shape, optim)``: whether the rule updates a layer's linear weight or stack of experts of this shape.
    ``state_bytes(shape, setting)``: states of one such matrix, without master weights.
    ``step_bytes(shapes, setting)``: workspace of one update of all of them.
    ``sent_bytes(shape, setting)``: what a rank sends to the ranks that share its copy of the model when one such matrix
    is updated.
    ``product_bytes(shapes, setting)``: device workspace for matrices sent from host memory; None: the host computes
    everything.
    """

    source: str
    takes: Callable[[TensorShape, OptimConfig], bool]
    state_bytes: Callable[[TensorShape, Setting], int]
    step_bytes: Callable[[Sequence[TensorShape], Setting], int]
    states: tuple[str, ...] = ("fp32",)  # supported formats of its states
    masters: tuple[str, ...] = ("fp32", "none")
    shardable: bool = False  # supports matrices whose rows are sharded over ranks
    sent_bytes: Callable[[TensorShape, Setting], int] | None = None  # None: its update sends nothing
    product_bytes: Callable[[Sequence[TensorShape], Setting], int] | None = None
    inheritable: bool = True  # a new layer can inherit its parents' moments


def _low_rank(method: str, source: str) -> Rule:
    def takes(shape: TensorShape, optim: OptimConfig) -> bool:
        rank = 1 if method == "apollo_mini" else optim.rank
        return len(shape) == 2 and is_low_rank(shape[0], shape[1], rank)

    def state_bytes(shape: TensorShape, setting: Setting) -> int:
        rows, columns = shape
        return low_rank_state_bytes(method, rows, columns, setting.optim.rank)

    def step_bytes(shapes: Sequence[TensorShape], setting: Setting) -> int:
        rank, has_master = setting.optim.rank, setting.masters == "fp32"
        each = (
            low_rank_step_bytes(method, shape[0], shape[1], rank, width=setting.width, has_master=has_master)
            for shape in shapes
        )
        return max(each, default=0)  # matrices are updated one by one

    return Rule(source, takes, state_bytes, step_bytes, inheritable=False)  # every matrix has its own projection


def _is_matrix(shape: TensorShape, optim: OptimConfig) -> bool:
    return len(shape) in (2, 3)


def _maps(shapes: Sequence[TensorShape]) -> list[tuple[int, int]]:
    """Rows and columns of each matrix; a stack of experts has several."""
    return [(shape[-2], shape[-1]) for shape in shapes for _ in range(prod(shape[:-2]))]


def _local(shape: TensorShape, num_shards: int) -> TensorShape:
    """Shape on the first of the ranks that share it: rows of a matrix, or whole experts of a stack."""
    return (-(-shape[0] // num_shards), *shape[1:])


def _muon_step_bytes(shapes: Sequence[TensorShape], setting: Setting) -> int:
    shards = setting.num_shards
    stacks = [_local(shape, shards) for shape in shapes if len(shape) == 3]  # no rank needs another's experts
    matrices = [shape for shape in shapes if len(shape) == 2]
    step_bytes = partial(
        muon_step_bytes,
        states=setting.states,
        masters=setting.masters,
        compute_width=setting.compute_width,
        row_blocks=setting.row_blocks,
    )
    if shards == 1:
        return step_bytes(_maps(shapes))
    return max(step_bytes(_maps(stacks)), step_bytes(_maps(matrices), num_shards=shards))


def _muon_sent_bytes(shape: TensorShape, setting: Setting) -> int:
    """Bytes to send a matrix to the rank that orthogonalizes it and back, without the rows that stay on a rank."""
    if len(shape) != 2:
        return 0
    shards, own = setting.num_shards, prod(_local(shape, setting.num_shards))
    return 2 * setting.compute_width * own * (shards - 1) // shards


RULES: dict[str, Rule] = {
    ADAMW: Rule(
        source="arXiv 1711.05101",
        takes=lambda shape, optim: False,  # it gets every tensor that no other rule takes
        state_bytes=lambda shape, setting: 0,
        step_bytes=lambda shapes, setting: 0,
        states=("fp32", "8bit"),
        masters=("fp32", "8bit", "none"),
        shardable=True,
    ),
    "muon": Rule(
        source="arXiv 2502.16982; 8 bits: arXiv 2509.23106",
        takes=_is_matrix,
        state_bytes=lambda shape, setting: sum(
            momentum_bytes(*sides, setting.states) for sides in _maps([_local(shape, setting.num_shards)])
        ),
        step_bytes=_muon_step_bytes,
        product_bytes=lambda shapes, setting: muon_product_bytes(
            _maps(shapes), compute_width=setting.compute_width, row_blocks=setting.row_blocks
        ),
        states=("fp32", "8bit"),
        masters=("fp32", "8bit", "none"),
        shardable=True,
        sent_bytes=_muon_sent_bytes,
    ),
    "scale": Rule(
        source="arXiv 2506.16659",
        takes=_is_matrix,
        state_bytes=lambda shape, setting: 0,
        step_bytes=lambda shapes, setting: scale_step_bytes(
            _maps([_local(shape, setting.num_shards) for shape in shapes]),
            states=setting.states,
            masters=setting.masters,
        ),
        states=("fp32", "8bit"),  # it has no states, so any format will do
        masters=("fp32", "8bit", "none"),
        shardable=True,  # it normalizes rows
    ),
    "galore": _low_rank("galore", "arXiv 2403.03507"),
    "apollo": _low_rank("apollo", "arXiv 2412.05270"),
    "apollo_mini": _low_rank("apollo_mini", "arXiv 2412.05270, rank 1"),
}


def masters_of(rule: str, memory: MemoryConfig) -> str:
    """Format of the master weights of bf16 weights that this rule updates: "fp32", "8bit" or "none"."""
    if memory.master_weights == "8bit":
        return "8bit"
    return "fp32" if memory.master_weights in (True, rule) else "none"


def matrices_of_layer(shape: ModelShape) -> tuple[TensorShape, ...]:
    """Matrices of a layer that a rule can take: the weights of its linear layers, and stacks of experts."""
    stacks = (tensor for tensor in shape.other_shapes("layer") if len(tensor) == 3)
    return (*((linear.out_features, linear.in_features) for linear in shape.linears), *stacks)


def row_blocks(shape: ModelShape) -> RowBlocks:
    """Rows of each map in a layer's fused projections, by the shape of the fused matrix; Muon updates them separately.

    Only families whose code in ``transformers`` splits the product into consecutive blocks are listed. A matrix that
    shares its shape with another stays whole.
    """
    if shape.model_type != "phi3":
        return NO_BLOCKS
    query_size, heads = shape.query_size, shape.num_attention_heads
    kv_size = query_size // heads * (shape.num_key_value_heads or heads)
    shapes = [(linear.out_features, linear.in_features) for linear in shape.linears]
    blocks: dict[TensorShape, tuple[int, ...]] = {}
    for linear, matrix in zip(shape.linears, shapes, strict=True):
        half = linear.out_features // 2
        rows = {"self_attn.qkv_proj": (query_size, kv_size, kv_size), "mlp.gate_up_proj": (half, half)}.get(linear.name)
        if rows is not None and shapes.count(matrix) == 1:
            blocks[matrix] = rows
    return blocks


def split_by_rule(
    shapes: Sequence[TensorShape], candidates: Sequence[TensorShape], rule: str, optim: OptimConfig
) -> tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]:
    """Split the shapes of trained tensors: the ``candidates`` that the rule takes, and the rest for AdamW."""
    taken = tuple(matrix for matrix in candidates if RULES[rule].takes(matrix, optim))
    rest = list(shapes)
    for matrix in taken:
        rest.remove(matrix)
    return taken, tuple(rest)
