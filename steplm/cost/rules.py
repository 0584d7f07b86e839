"""The update rules as planning sees them: what each takes, holds, needs while it updates, and goes with. No torch.

To add a rule: a row here, and its class in ``steplm.optim.build``. The bytes of both are compared at every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steplm.config import MemoryConfig, OptimConfig
from steplm.cost.formats import is_low_rank, low_rank_state_bytes, low_rank_step_bytes
from steplm.types import ModelShape, TensorShape

ADAMW = "adamw"  # updates whatever no other rule takes: vectors, embeddings, head, adapters


@dataclass(frozen=True)
class Rule:
    """An update rule.

    ``takes(shape, optim)``: whether it updates a matrix of this shape, out of a layer's linear maps and stacks of
    experts. ``state_bytes(shape, optim, states)``: of one such matrix, without a master weight. ``step_bytes(shapes,
    optim, states, width, has_master)``: workspace of an update of all of them, in any order; ``width`` is the bytes of
    a weight, ``has_master`` whether it is fp32 or has an fp32 copy.
    """

    source: str
    takes: Callable[[TensorShape, OptimConfig], bool]
    state_bytes: Callable[[TensorShape, OptimConfig, str], int]
    step_bytes: Callable[[Sequence[TensorShape], OptimConfig, str, int, bool], int]
    states: tuple[str, ...] = ("fp32",)  # formats of its states
    shardable: bool = False  # works on a rank's rows of a matrix
    fused_backward: bool = True


def _low_rank(method: str, source: str) -> Rule:
    def state_bytes(shape: TensorShape, optim: OptimConfig, states: str) -> int:
        rows, columns = shape
        return low_rank_state_bytes(method, rows, columns, optim.rank)

    def step_bytes(shapes: Sequence[TensorShape], optim: OptimConfig, states: str, width: int, has_master: bool) -> int:
        each = (
            low_rank_step_bytes(method, rows, columns, optim.rank, width=width, has_master=has_master)
            for rows, columns in shapes
        )
        return max(each, default=0)  # one after the other

    def takes(shape: TensorShape, optim: OptimConfig) -> bool:
        rank = 1 if method == "apollo_mini" else optim.rank
        return len(shape) == 2 and is_low_rank(shape[0], shape[1], rank)

    return Rule(source, takes, state_bytes, step_bytes)


RULES: dict[str, Rule] = {
    ADAMW: Rule(
        source="arXiv 1711.05101",
        takes=lambda shape, optim: False,  # all is its own already
        state_bytes=lambda shape, optim, states: 0,
        step_bytes=lambda shapes, optim, states, width, has_master: 0,
        states=("fp32", "8bit"),
        shardable=True,
    ),
    "galore": _low_rank("galore", "arXiv 2403.03507"),
    "apollo": _low_rank("apollo", "arXiv 2412.05270"),
    "apollo_mini": _low_rank("apollo_mini", "arXiv 2412.05270, rank 1"),
}


def keeps_master(rule: str, memory: MemoryConfig) -> bool:
    """Whether bf16 weights that this rule updates have an fp32 copy."""
    return memory.master_weights in (True, rule)


def matrices_of_layer(shape: ModelShape) -> tuple[TensorShape, ...]:
    """What a rule may take of a layer: the weights of its linear maps, and stacks of experts."""
    stacks = (tensor for tensor in shape.other_shapes("layer") if len(tensor) == 3)
    return (*((linear.out_features, linear.in_features) for linear in shape.linears), *stacks)


def split_by_rule(
    shape: ModelShape, rule: str, optim: OptimConfig
) -> tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]:
    """Shapes of a trained layer's tensors: those that the rule takes, and those that AdamW updates."""
    taken = tuple(matrix for matrix in matrices_of_layer(shape) if RULES[rule].takes(matrix, optim))
    rest = list(shape.layer_shapes)
    for matrix in taken:
        rest.remove(matrix)
    return taken, tuple(rest)
