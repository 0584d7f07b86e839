"""The update rules as planning sees them: what each takes, holds, needs while it updates, and goes with. No torch.

To add a rule: a row here, and its class in ``steplm.optim.build``. The bytes of both are compared at every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from steplm.config import MemoryConfig, OptimConfig
from steplm.cost.formats import (
    is_low_rank,
    low_rank_state_bytes,
    low_rank_step_bytes,
    muon_product_bytes,
    muon_state_bytes,
    muon_step_bytes,
    scale_step_bytes,
)
from steplm.types import ModelShape, TensorShape

ADAMW = "adamw"  # updates whatever no other rule takes: vectors, embeddings, head


@dataclass(frozen=True)
class Setting:
    """What the bytes of a rule depend on beside the shapes."""

    optim: OptimConfig
    states: str  # format of the states: "fp32", "8bit"
    masters: str  # beside a bf16 weight: "fp32", "8bit" or "none"; of an fp32 weight "fp32"
    width: int  # bytes of a weight
    compute_width: int = 4  # bytes of a number in Newton–Schulz: 2 on CUDA
    num_shards: int = 1  # ranks that share the rows of a matrix


@dataclass(frozen=True)
class Rule:
    """An update rule.

    ``takes(shape, optim)``: whether it updates a matrix of this shape, out of a layer's linear maps and stacks of
    experts. ``state_bytes(shape, setting)``: of one such matrix, without a master weight. ``step_bytes(shapes,
    setting)``: workspace of one update of all of them. ``sent_bytes(shape, setting)``: what a rank sends to the ranks
    that share its copy of the model, in one update of one such matrix. Shapes are of whole matrices, bytes of one rank.
    ``product_bytes``: of the workspace, what the device holds for matrices that are sent to it from host memory; None:
    the host computes everything.
    """

    source: str
    takes: Callable[[TensorShape, OptimConfig], bool]
    state_bytes: Callable[[TensorShape, Setting], int]
    step_bytes: Callable[[Sequence[TensorShape], Setting], int]
    states: tuple[str, ...] = ("fp32",)  # formats of its states
    masters: tuple[str, ...] = ("fp32", "none")
    shardable: bool = False  # goes with matrices whose rows are shared by ranks
    sent_bytes: Callable[[TensorShape, Setting], int] | None = None  # None: its update sends nothing
    fused_backward: bool = True
    product_bytes: Callable[[Sequence[TensorShape], Setting], int] | None = None
    inheritable: bool = True  # a new layer can take over the moments of its parents


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
        return max(each, default=0)  # one after the other

    return Rule(source, takes, state_bytes, step_bytes, inheritable=False)  # each has a projection of its own


def _is_matrix(shape: TensorShape, optim: OptimConfig) -> bool:
    return len(shape) in (2, 3)


def _maps(shapes: Sequence[TensorShape]) -> list[tuple[int, int]]:
    """Rows and columns of each linear map: a stack of experts has several."""
    return [(shape[-2], shape[-1]) for shape in shapes for _ in range(prod(shape[:-2]))]


def _local(shape: TensorShape, num_shards: int) -> TensorShape:
    """On the first of the ranks that share it: rows of a matrix, or whole experts of a stack."""
    return (-(-shape[0] // num_shards), *shape[1:])


def _muon_step_bytes(shapes: Sequence[TensorShape], setting: Setting) -> int:
    shards = setting.num_shards
    stacks = [_local(shape, shards) for shape in shapes if len(shape) == 3]  # no rank needs another's experts
    matrices = [shape for shape in shapes if len(shape) == 2]
    step_bytes = partial(
        muon_step_bytes, states=setting.states, masters=setting.masters, compute_width=setting.compute_width
    )
    if shards == 1:
        return step_bytes(_maps(shapes))
    return max(step_bytes(_maps(stacks)), step_bytes(_maps(matrices), num_shards=shards))


def _muon_sent_bytes(shape: TensorShape, setting: Setting) -> int:
    """A matrix goes to the rank that orthogonalises it, and comes back; what stays on a rank is not sent."""
    if len(shape) != 2:
        return 0
    shards, own = setting.num_shards, prod(_local(shape, setting.num_shards))
    return 2 * setting.compute_width * own * (shards - 1) // shards


RULES: dict[str, Rule] = {
    ADAMW: Rule(
        source="arXiv 1711.05101",
        takes=lambda shape, optim: False,  # all is its own already
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
            muon_state_bytes(*sides, setting.states) for sides in _maps([_local(shape, setting.num_shards)])
        ),
        step_bytes=_muon_step_bytes,
        product_bytes=lambda shapes, setting: muon_product_bytes(_maps(shapes), compute_width=setting.compute_width),
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
        states=("fp32", "8bit"),  # it has none
        masters=("fp32", "8bit", "none"),
        shardable=True,  # it normalises rows
    ),
    "galore": _low_rank("galore", "arXiv 2403.03507"),
    "apollo": _low_rank("apollo", "arXiv 2412.05270"),
    "apollo_mini": _low_rank("apollo_mini", "arXiv 2412.05270, rank 1"),
}


def masters_of(rule: str, memory: MemoryConfig) -> str:
    """What is held beside a bf16 weight that this rule updates: "fp32", "8bit" or "none"."""
    if memory.master_weights == "8bit":
        return "8bit"
    return "fp32" if memory.master_weights in (True, rule) else "none"


def matrices_of_layer(shape: ModelShape) -> tuple[TensorShape, ...]:
    """What a rule may take of a layer: the weights of its linear maps, and stacks of experts."""
    stacks = (tensor for tensor in shape.other_shapes("layer") if len(tensor) == 3)
    return (*((linear.out_features, linear.in_features) for linear in shape.linears), *stacks)


def split_by_rule(
    shapes: Sequence[TensorShape], candidates: Sequence[TensorShape], rule: str, optim: OptimConfig
) -> tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]:
    """Of the shapes of trained tensors, those of ``candidates`` that the rule takes, and those that AdamW updates."""
    taken = tuple(matrix for matrix in candidates if RULES[rule].takes(matrix, optim))
    rest = list(shapes)
    for matrix in taken:
        rest.remove(matrix)
    return taken, tuple(rest)
