"""Activation bytes of one Transformer layer, by counting what each of its operations saves and allocates.

N tokens of a micro-batch of B sequences of S, d hidden size, q and k widths of queries and of keys, f feed-forward
size, h heads, r rank of the adapters, w bytes of a number (2 in bf16, 4 in fp32). The layer is the one that most
families of ``transformers`` have: norm, attention, add, norm, gated feed-forward, add, with PyTorch's fused attention,
whose S x S scores never exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from steplm.config import RunConfig
from steplm.cost.terms import WEIGHT_BYTES
from steplm.schedule import Adapter, Role, Trained
from steplm.types import LinearShape, ModelShape


@dataclass(frozen=True)
class LayerKind:
    """How a family's layer differs from Llama's."""

    normalises_heads: bool = False  # each head's query and key
    norms_after: bool = False  # attention and feed-forward are normalised behind themselves too
    fp32_norm_weights: bool = False  # the norm's weight, plus one, multiplies in fp32
    num_rotary: int = 1  # kinds of rotary angles
    sliding_window: int | None = None  # tokens, by default


GEMMA = LayerKind(fp32_norm_weights=True)
# Families whose layers are counted here. The others can be simulated.
MODELLED = {
    **dict.fromkeys(("llama", "qwen2", "smollm3", "granite"), LayerKind()),
    "mistral": LayerKind(sliding_window=4096),
    "qwen3": LayerKind(normalises_heads=True),
    "gemma": GEMMA,
    "gemma3_text": replace(GEMMA, norms_after=True, normalises_heads=True, num_rotary=2, sliding_window=4096),
}


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer in one micro-batch."""

    saved: int  # from its forward until its backward
    backward: int  # at most beside that during its backward, the gradient of its output included
    fetched_backward: int  # the same where what it saved has to come back from host memory
    saved_product: int  # of ``saved``, what is gone when its first parameter gradient is made
    fetched_norm: int  # as ``fetched_backward``, at its end: its first norm, when all its gradients exist
    product_gradient: int  # of ``backward``, what exists when its first parameter gradient does
    first_gradient: int  # the gradient of its first parameters, those of the feed-forward's last map


@dataclass(frozen=True)
class Workload:
    """What the sizes of activations depend on besides the model."""

    shape: ModelShape
    precision: str
    num_sequences: int  # of a micro-batch
    sequence_length: int
    has_mask: bool = False  # attention stays inside documents
    sliding_window: int | None = None  # of the layers that have one; by default the family's

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape) -> Workload:
        """A micro-batch of a run."""
        return cls(
            shape,
            config.train.precision,
            config.micro_batch_size,
            config.train.sequence_length,
            config.data.within_documents,
            sliding_window(config),
        )

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.sequence_length

    @property
    def width(self) -> int:
        return WEIGHT_BYTES[self.precision]

    @property
    def mask_bytes(self) -> int:
        """One bit a byte, where attention does not see all tokens before: ``N S``, or ``S S`` for all sequences."""
        window = self.sliding_window or MODELLED[self.shape.model_type].sliding_window
        slides = window is not None and window < self.sequence_length
        return self.sequence_length * (self.num_tokens if self.has_mask else self.sequence_length * slides)

    @property
    def stream_bytes(self) -> int:
        """``w N d``: the hidden states between two layers."""
        return self.width * self.num_tokens * self.shape.hidden_size

    @property
    def feed_forward_bytes(self) -> int:
        """``w N f``: one of the tensors inside the feed-forward block."""
        return self.width * self.num_tokens * _linear(self.shape, "gate_proj").out_features

    @property
    def forward_bytes(self) -> int:
        """The widest moment inside a layer of a forward pass that keeps nothing: ``4 w N d + max(3 w N f, …)``."""
        q, k = (_linear(self.shape, name).out_features for name in ("q_proj", "k_proj"))
        attention = self.width * self.num_tokens * (3 * q + 4 * k)
        if self.mask_bytes:
            attention += (self.width + 1) * self.num_tokens * self.sequence_length
        return 4 * self.stream_bytes + max(3 * self.feed_forward_bytes, attention)

    @property
    def batch_bytes(self) -> int:
        """Tokens and labels ``16 N``; rotary cosines and sines ``2 w S q/h``, and their frequencies.

        With a mask, the positions ``8 N``.
        """
        shape, S = self.shape, self.sequence_length
        head_dim = (shape.attention_size or shape.hidden_size) // shape.num_attention_heads
        rows = self.num_tokens if self.has_mask else S
        positions = 8 * self.num_tokens if self.has_mask else 0
        rotary = 2 * self.width * rows * head_dim + 4 * (head_dim + 2)
        return 16 * self.num_tokens + rotary * MODELLED[shape.model_type].num_rotary + positions


def recomputes(config: RunConfig, role: Role) -> bool:
    """Whether ``train.gradient_checkpointing`` names layers of this role."""
    return config.train.gradient_checkpointing in (True, "new" if isinstance(role, Trained) else "frozen")


def sliding_window(config: RunConfig) -> int | None:
    """Tokens that a layer of the run sees at most, where its keys say so; else the family's default holds."""
    window = config.model.extra.get("sliding_window")
    return window if isinstance(window, int) and config.model.extra.get("use_sliding_window", True) else None


def is_modelled(shape: ModelShape) -> bool:
    """Whether the layers of this family are counted here."""
    return shape.model_type in MODELLED


def norm_saved(work: Workload, *, trained: bool) -> int:
    """``4 N d`` for the fp32 input, ``4 N`` for its scale, and ``w N d`` for a trained weight's gradient.

    Gemma's weight is added to 1 and multiplies in fp32: ``4 N d`` for its gradient, and ``4 d`` for itself.
    """
    return _norm_saved(work, work.shape.hidden_size, work.num_tokens, trained=trained)


def norm_backward(work: Workload) -> int:
    """Four fp32 tensors of ``4 N d`` at once, and the incoming gradient where none of them is that one."""
    incoming = 0 if MODELLED[work.shape.model_type].fp32_norm_weights else work.stream_bytes
    return 16 * work.num_tokens * work.shape.hidden_size + incoming


def layer_activations(work: Workload, role: Role) -> LayerActivations:
    """Of a layer that is trained as a whole, or of a frozen one with or without an adapter.

    Saved: two norms (four where attention and feed-forward are normalised behind themselves too),
    ``w N (2 q + 2 k) + 4 N h`` of the attention (query, key, value, output and its normaliser), ``3 w N f`` of the
    feed-forward (gate, its activation, up), and the inputs of linear maps that need them for a gradient:
    ``2 w N d + w N f``; ``w N r`` for each adapter.
    """
    shape, w, N = work.shape, work.width, work.num_tokens
    family, trained = MODELLED[shape.model_type], isinstance(role, Trained)
    adapted, r = (role.target_modules, role.rank) if isinstance(role, Adapter) else ((), 0)
    d = shape.hidden_size
    q, k = _linear(shape, "q_proj").out_features, _linear(shape, "k_proj").out_features
    inner, f = work.feed_forward_bytes, _linear(shape, "gate_proj").out_features

    def needs_input(*names: str) -> bool:
        return trained or any(name in adapted for name in names)

    attention = 2 * w * N * (q + k) + 4 * N * shape.num_attention_heads
    if work.mask_bytes:
        attention += w * N * work.sequence_length  # made of the mask of bits anew in each layer
    if family.normalises_heads:
        head_dim = q // shape.num_attention_heads
        attention += _norm_saved(work, q, N * q // head_dim, trained=trained)
        attention += _norm_saved(work, k, N * k // head_dim, trained=trained)
    saved = (4 if family.norms_after else 2) * norm_saved(work, trained=trained) + attention
    saved += work.stream_bytes * (needs_input("q_proj", "k_proj", "v_proj") + needs_input("gate_proj", "up_proj"))
    saved += inner * (3 + needs_input("down_proj")) + w * N * r * len(adapted)

    # The largest moment of the backward pass: the product in the feed-forward passes its gradient on to both
    # factors. Its own value, if it was saved, is gone by then.
    backward = work.stream_bytes + inner * (3 - needs_input("down_proj"))
    first_gradient = 0
    if trained:
        first_gradient = w * f * d
    elif "down_proj" in adapted:
        first_gradient = w * r * (d + f)
        backward -= w * N * r
    # Where the feed-forward is narrow, the backward pass of the norm before it holds more.
    norm = work.stream_bytes + 16 * N * d - inner * (3 + needs_input("down_proj"))
    if family.norms_after:  # the norm behind the feed-forward comes first, before anything is let go
        backward -= norm_saved(work, trained=trained)
        norm = work.stream_bytes + 16 * N * d
    product_gradient = work.stream_bytes + inner
    return LayerActivations(
        saved=saved,
        backward=max(backward, norm, product_gradient),
        fetched_backward=work.stream_bytes + 5 * inner,
        # Behind themselves normalised layers pass on two more gradients of hidden states; at most, as simulated.
        fetched_norm=work.stream_bytes * (3 if family.norms_after else 1) + 24 * N * d,
        saved_product=inner * needs_input("down_proj"),
        product_gradient=product_gradient,
        first_gradient=first_gradient,
    )


def _norm_saved(work: Workload, size: int, num_rows: int, *, trained: bool) -> int:
    if MODELLED[work.shape.model_type].fp32_norm_weights:  # the normalised input in fp32, and 1 + the weight
        return (4 + 4 * trained) * work.num_tokens * size + 4 * num_rows + 4 * size * work.num_tokens // num_rows
    return (4 + work.width * trained) * work.num_tokens * size + 4 * num_rows


def _linear(shape: ModelShape, name: str) -> LinearShape:
    return next(linear for linear in shape.linears if linear.name.endswith(f".{name}"))
