"""How a new layer starts. Each operator makes a whole layer from its parents' layers.

To add one: write a function of the parents and add a line to ``OPERATORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steplm.errors import GrowthError

Layer = Mapping[str, Tensor]  # tensors of one layer, by their name below the layer: "mlp.up_proj.weight"

# The linear maps that write into the residual stream, as the families call them.
OUTPUT_PROJECTIONS = (
    "o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2",
)  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """A growth operator.

    ``function(parents, fraction)`` returns tensors that share no storage with the parents. ``parents``
    are one or two layers with equal names, shapes and dtypes, the lower one first, and the new layer
    stands at ``fraction`` of the way between them.
    """

    function: Callable[[Sequence[Layer], float], dict[str, Tensor]]
    function_preserving: bool = False  # the grown model computes what the old one did
    fresh: bool = False  # its one parent is a freshly initialised layer, not one of the model's


def copy_lower(parents: Sequence[Layer], fraction: float) -> dict[str, Tensor]:
    """A copy of the lower parent."""
    return {name: tensor.clone() for name, tensor in parents[0].items()}


def interpolate(parents: Sequence[Layer], fraction: float) -> dict[str, Tensor]:
    """Every tensor on the line between the two parents; at ``fraction`` 0.5 it is their mean.

    Computed in fp32 and rounded once. Source: STEP (arXiv 2504.04151), Interpolation-Mean.
    """
    if len(parents) == 1:
        return copy_lower(parents, fraction)
    lower, upper = parents
    return {
        name: torch.lerp(lower[name].float(), upper[name].float(), fraction).to(lower[name].dtype) for name in lower
    }


def copy_with_zero_output(parents: Sequence[Layer], fraction: float) -> dict[str, Tensor]:
    """A copy of the lower parent that adds nothing to the residual stream: the function is unchanged.

    Raises:
        GrowthError: the layer has not both attention's and the MLP's output projection.

    Source: LLaMA-Pro's block expansion (arXiv 2401.02415).
    """
    layer = copy_lower(parents, fraction)
    outputs = [name for name in layer if name.split(".")[-2:-1] and name.split(".")[-2] in OUTPUT_PROJECTIONS]
    modules = {name.rpartition(".")[0] for name in outputs}
    if len(modules) < 2:
        raise GrowthError(
            f"operator 'identity' must set attention's and the MLP's output projection to zero, but found "
            f"{len(modules)} of them by name ({', '.join(OUTPUT_PROJECTIONS)}) among {sorted(layer)}. "
            "Use another growth operator for this model.",
            found=sorted(modules),
        )
    for name in outputs:
        layer[name].zero_()
    return layer


OPERATORS: dict[str, Operator] = {
    "interpolation": Operator(copy_lower),
    "interpolation_mean": Operator(interpolate),
    "stack": Operator(copy_lower),  # interpolation at position 'top', whose parents are a whole block
    "identity": Operator(copy_with_zero_output, function_preserving=True),
    "random": Operator(copy_lower, fresh=True),
}
