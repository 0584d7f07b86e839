"""Growth operators, which initialize new layers. Each operator creates a whole layer from its parent layers.

To add an operator, write a function of the parents and add it to ``OPERATORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steplm.errors import GrowthError
from steplm.rows import Rows

Layer = Mapping[str, Tensor]  # tensors of one layer, by name within the layer: "mlp.up_proj.weight"

# Names, across model families, of the linear layers that write to the residual stream.
OUTPUT_PROJECTIONS = (
    "o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2",
)  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """A growth operator.

    ``function(parents, fraction)`` returns tensors that share no storage with the parents. ``parents`` are one or two
    layers with equal names, shapes and dtypes, the lower one first; the new layer lies at ``fraction`` of the way
    between them.
    """

    function: Callable[[Sequence[Layer], float], dict[str, Tensor]]
    function_preserving: bool = False  # the grown model computes the same function as the old one
    fresh: bool = False  # its only parent is a freshly initialized layer, not a layer of the model
    mixes_rows: bool = False  # a row of a new tensor depends on other rows, so no rank can compute its rows alone


def copy_lower(parents: Sequence[Layer], fraction: float) -> dict[str, Tensor]:
    """A copy of the lower parent."""
    return {name: tensor.clone() for name, tensor in parents[0].items()}


def interpolate(parents: Sequence[Layer], fraction: float) -> dict[str, Tensor]:
    """Interpolate every tensor linearly between the two parents; at ``fraction`` 0.5 it is their mean.

    Computed in fp32 and rounded once. Source: STEP (arXiv 2504.04151), Interpolation-Mean.
    """
    if len(parents) == 1:
        return copy_lower(parents, fraction)
    lower, upper = parents
    return {
        name: torch.lerp(tensor.float(), upper[name].float(), fraction).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()  # counts and masks cannot be interpolated
        for name, tensor in lower.items()
    }


def copy_with_zero_output(parents: Sequence[Layer], fraction: float) -> dict[str, Tensor]:
    """A copy of the lower parent that adds nothing to the residual stream: the function is unchanged.

    ``require_unchanged_function`` tests this, because a layer may write to the stream through other modules than its
    output projections.

    Raises:
        GrowthError: the layer has no output projection with a known name.

    Source: LLaMA-Pro's block expansion (arXiv 2401.02415).
    """
    layer = copy_lower(parents, fraction)
    outputs = [name for name in layer if _is_output(name)]
    if not outputs:
        raise GrowthError(
            "operator 'identity' must set the output projections of a new layer to zero, but none of "
            f"{', '.join(OUTPUT_PROJECTIONS)} is among {', '.join(sorted(layer)[:8])}. "
            "Use another growth operator for this model.",
            found=sorted(layer),
        )
    for name in outputs:
        layer[name].zero_()
    return layer


def _is_output(name: str) -> bool:
    """Whether a name is that of an output projection.

    ``self_attn.o_proj.weight``, or ``mlp.experts.down_proj_bias`` if the experts are one tensor without a module.
    """
    return any(part.removesuffix("_bias") in OUTPUT_PROJECTIONS for part in name.split("."))


OPERATORS: dict[str, Operator] = {
    "interpolation": Operator(copy_lower),
    "interpolation_mean": Operator(interpolate),
    "stack": Operator(copy_lower),  # interpolation at position 'top', whose parents are a whole block
    "identity": Operator(copy_with_zero_output, function_preserving=True),
    "random": Operator(copy_lower, fresh=True),
}


def require_row_wise(operator: str, rows: Rows) -> None:
    """Reject an operator that mixes rows if a rank has only some of them.

    Raises:
        GrowthError: the operator mixes rows, and the model is sharded.
    """
    if OPERATORS[operator].mixes_rows and not rows.is_whole:
        raise GrowthError(
            f"growth operator {operator!r} mixes rows, and each of {rows.count} ranks has only its own: set "
            "distributed.shard_size=1.",
            operator=operator,
        )
