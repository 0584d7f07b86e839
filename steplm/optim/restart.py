"""ReLoRA's partial reset of the adapters' moments when fresh adapters replace them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from steplm.errors import ConfigError
from steplm.optim.quantized import CodeBook, dynamic_tree


def kept_moments(tensors: Mapping[str, Tensor], names: Iterable[str], keep: float) -> dict[str, Tensor]:
    """Saved adapter moments with all but the largest set to zero, for the fresh adapters of the same names.

    In each tensor, the fraction ``keep`` with the largest magnitude stays, rounded down to whole elements. ``exp_avg``
    stays only where ``exp_avg_sq`` stays too: Adam divides one by the root of the other, and the first gradient of a
    fresh ``lora_A`` is zero because ``lora_B`` is, so a first moment alone would be divided by ``eps``.

    A ``master`` is never carried over: the factors are fresh, and the new optimizer has its own. Adam's step counts are
    not handled here. ReLoRA lets them continue, so nearly empty moments get no bias correction, and the learning rate
    must warm up again. After a full reset (``keep=0``) a parameter is like a new one if its step count is 0.

    Source: ReLoRA (arXiv 2307.05695), section 3, which sets 99% to zero (``keep=0.01``), tensor by tensor, in both
    moments of ``lora_A`` and ``lora_B``, each by its own magnitude. The condition on ``exp_avg`` is our addition.

    Args:
        tensors: the result of ``AdamW.state_dict``, with moments in fp32 or 8 bits; not modified.
        names: names of the adapters' parameters.
        keep: fraction of the elements, 0 to 1.

    Returns:
        New tensors under ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, and the scales of 8-bit moments.

    Raises:
        ConfigError: ``keep`` is not between 0 and 1.
        KeyError: a name has no saved moments.
    """
    if not 0 <= keep <= 1:
        raise ConfigError(f"a share of {keep} of the moments cannot be kept: set pet.restart_keep to 0 … 1.", keep=keep)
    kept: dict[str, Tensor] = {}
    for name in names:
        first, second = f"{name}.exp_avg", f"{name}.exp_avg_sq"
        in_second = _largest(_magnitude(tensors, second), keep)
        in_first = _largest(_magnitude(tensors, first), keep) & in_second
        for key, mask, signed in ((first, in_first, True), (second, in_second, False)):
            is_code = tensors[key].dtype == torch.uint8
            zero = dynamic_tree(signed).index(0.0) if is_code else 0.0
            kept[key] = tensors[key].masked_fill(~mask.view_as(tensors[key]), zero)
            if is_code:
                kept[f"{key}_scale"] = tensors[f"{key}_scale"].clone()
    return kept


def _magnitude(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """Magnitude of every element, flat, in fp32."""
    values = tensors[key].flatten()
    if values.dtype != torch.uint8:
        return values.abs()
    book = CodeBook(signed=key.endswith(".exp_avg"), device=values.device)
    return book.dequantize(values, tensors[f"{key}_scale"].view(-1)).abs_()


def _largest(magnitude: Tensor, keep: float) -> Tensor:
    """Mask of the fraction ``keep`` of elements with the largest magnitude; ties are broken arbitrarily."""
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    mask[magnitude.topk(int(keep * len(magnitude)), sorted=False).indices] = True
    return mask
