"""LoRA on the embedding matrix, and on a head that is tied to it.

Both use the same matrix, so both use the same pair of factors. The update can therefore be merged into the matrix, and
embedding and head always agree on ``E + scaling * B A``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steplm.errors import ConfigError
from steplm.pet.lora import LoRALinear, require_rank


class LoRAEmbedding(nn.Embedding):
    """An embedding plus a low-rank update: ``E[ids] + scaling * B[ids] A``.

    ``adapt_embedding`` converts an embedding to this class: it adds ``lora_A`` (rank, hidden) and ``lora_B``
    (vocabulary, rank) in the weight's dtype and on its device.
    """

    factor_names: ClassVar[tuple[str, ...]] = LoRALinear.factor_names
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    rank: int
    scaling: float
    fresh_factors = LoRALinear.fresh_factors

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        low = F.embedding(input, self.lora_B, self.padding_idx)
        rows = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.lora_A, alpha=self.scaling)
        return rows.view(output.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


class TiedLoRAHead(LoRALinear):
    """A head that shares the matrix and factors of an adapted embedding: ``h (E + scaling * B A)^T + b``."""

    def __init__(self, head: nn.Linear, embedding: LoRAEmbedding) -> None:
        super().__init__(head, embedding.rank, embedding.scaling)
        for name in self.factor_names:
            setattr(self, name, getattr(embedding, name))


def check_embedding(name: str, embedding: nn.Module, rank: int) -> None:
    """Check that ``adapt_embedding`` can adapt this module.

    Raises:
        ConfigError: the module is not an embedding, has its own lookup, or is smaller than the rank.
    """
    own = [cls for cls in type(embedding).__mro__ if cls not in nn.Embedding.__mro__ and "forward" in vars(cls)]
    # A model family may transform the rows (Gemma scales them), as long as it gets them from nn.Embedding.
    gets_rows = all("super" in vars(cls)["forward"].__code__.co_names for cls in own)
    if not isinstance(embedding, nn.Embedding) or isinstance(embedding, LoRAEmbedding) or not gets_rows:
        raise ConfigError(
            f"{name} is a {type(embedding).__name__}, which has no plain lookup that an adapter could be added to. "
            "Set plan.train_embeddings to always or first_stage.",
            target=name,
        )
    require_rank(name, embedding, rank)


def adapt_embedding(embedding: nn.Embedding, rank: int, scaling: float) -> LoRAEmbedding:
    """Turn an embedding that passes ``check_embedding`` into a ``LoRAEmbedding``, in place, with zero factors."""
    family = type(embedding)
    # A family's own forward still comes first, and reaches the adapter's through super().
    bases = (LoRAEmbedding,) if family is nn.Embedding else (family, LoRAEmbedding)
    embedding.__class__ = type(f"LoRA{family.__name__}", bases, {})
    assert isinstance(embedding, LoRAEmbedding)
    embedding.rank, embedding.scaling = rank, scaling
    for name, shape in LoRALinear.factor_shapes(embedding.weight.shape, rank).items():
        embedding.register_parameter(name, nn.Parameter(embedding.weight.new_zeros(shape)))
    return embedding
