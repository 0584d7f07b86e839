"""Activation bytes of one Transformer layer, by counting what each of its operations saves and allocates.

N tokens of a micro-batch, d hidden size, q and k widths of queries and of keys, f feed-forward size, r rank of the
adapters, w bytes of a number (2 in bf16, 4 in fp32). The layer is the one that most families of ``transformers`` have:
norm, attention, add, norm, gated feed-forward, add, with PyTorch's fused attention, whose S x S scores never exist.
Bytes that are of less than a number per token (rotary tables, masks of one bit) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from steplm.memory.terms import WEIGHT_BYTES
from steplm.types import ModelShape

# Families whose layers are counted here; the others can be simulated. The numbers are norms of q and k together:
# each is the norm of one head.
MODELLED = {"llama": 0, "mistral": 0, "qwen2": 0, "qwen3": 1, "smollm3": 0, "granite": 0}


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer in one micro-batch."""

    saved: int  # from its forward until its backward
    backward: int  # at most beside that during its backward, gradient of its output included
    backward_gradients: int  # of that, gradients of its own parameters


@dataclass(frozen=True)
class Workload:
    """What the sizes of activations depend on besides the model."""

    shape: ModelShape
    precision: str
    num_sequences: int  # of a micro-batch
    sequence_length: int
    adapter_rank: int = 0
    adapter_targets: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.sequence_length

    @property
    def width(self) -> int:
        return WEIGHT_BYTES[self.precision]

    @property
    def stream_bytes(self) -> int:
        """``w N d``: the hidden states between two layers."""
        return self.width * self.num_tokens * self.shape.hidden_size


def is_modelled(shape: ModelShape) -> bool:
    """Whether the layers of this family are counted here."""
    return shape.model_type in MODELLED


def norm_saved(work: Workload, *, trained: bool) -> int:
    """``4 N d`` for the fp32 input, ``4 N`` for its scale, and ``w N d`` for a trained weight's gradient."""
    return _norm_saved(work, work.shape.hidden_size, work.num_tokens, trained=trained)


def norm_backward(work: Workload) -> int:
    """Four fp32 tensors of ``4 N d`` at once, and the incoming gradient."""
    return 16 * work.num_tokens * work.shape.hidden_size + work.stream_bytes


def layer_activations(work: Workload, *, trained: bool) -> LayerActivations:
    """Of a layer that is trained as a whole, or of a frozen one with or without adapters."""
    shape, w, N = work.shape, work.width, work.num_tokens
    sizes = {linear.name.rpartition(".")[2]: linear for linear in shape.linears}
    d, q, k = shape.hidden_size, sizes["q_proj"].out_features, sizes["k_proj"].out_features
    f, r = sizes["gate_proj"].out_features, work.adapter_rank
    adapted = () if trained else work.adapter_targets

    def needs_input(*names: str) -> bool:
        return trained or any(name in adapted for name in names)

    attention = 2 * w * N * (q + k) + 4 * N * shape.num_attention_heads  # q, k, v, the output and its normaliser
    if MODELLED[shape.model_type]:
        head_dim = q // shape.num_attention_heads
        attention += _norm_saved(work, q, N * q // head_dim, trained=trained)
        attention += _norm_saved(work, k, N * k // head_dim, trained=trained)
    saved = 2 * norm_saved(work, trained=trained) + attention
    saved += w * N * d * (needs_input("q_proj", "k_proj", "v_proj") + needs_input("gate_proj", "up_proj"))
    saved += w * N * f * (3 + needs_input("down_proj"))  # gate, its activation, up; their product
    saved += w * N * r * len(adapted)  # the low-rank input of each adapter's second factor

    # The largest moment of the backward pass: the feed-forward product has passed its gradient on, to both factors.
    gradients = 0
    backward = work.stream_bytes + w * N * f * (3 - needs_input("down_proj"))
    if trained:
        gradients = w * f * d
    elif "down_proj" in adapted:
        gradients = w * r * (d + f)
        backward -= w * N * r
    return LayerActivations(saved, backward + gradients, gradients)


def _norm_saved(work: Workload, size: int, num_rows: int, *, trained: bool) -> int:
    return (4 + work.width * trained) * work.num_tokens * size + 4 * num_rows
