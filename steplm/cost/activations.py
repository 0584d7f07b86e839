"""Activation bytes of one Transformer layer, from what each of its operations saves and allocates.

Symbols: N tokens in a micro-batch of B sequences of length S, d hidden size, q and k widths of queries and keys, f
feed-forward size, h heads, r adapter rank, w bytes per element (2 in bf16, 4 in fp32). The layer is the usual one of
``transformers``: norm, attention, add, norm, gated feed-forward, add. Attention is PyTorch's fused kernel, which never
materializes the S x S scores, except in families that soft-cap them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from steplm.config import RunConfig
from steplm.cost.terms import WEIGHT_BYTES, adapted_linears
from steplm.schedule import Adapter, Role, Trained
from steplm.types import ModelShape


@dataclass(frozen=True)
class LayerKind:
    """How a family's layer differs from Llama's."""

    normalizes_heads: bool = False  # queries and keys are normalized per head
    norms_after: bool = False  # a norm after attention and feed-forward too
    fp32_norm_weights: bool = False  # the norm multiplies by (1 + weight) in fp32
    num_rotary: int = 1  # sets of rotary angles
    sliding_window: int | None = None  # the family's default, in tokens
    slides_on_request: bool = False  # only with use_sliding_window, and perhaps only layers from max_window_layers on
    eager_attention: bool = False  # soft-caps the scores, which the fused kernel cannot
    caps_logits: bool = False  # by default


GEMMA = LayerKind(fp32_norm_weights=True)
# Families whose layers are counted here; the memory of others can be simulated.
MODELED = {
    **dict.fromkeys(("llama", "granite"), LayerKind()),
    "qwen2": LayerKind(sliding_window=4096, slides_on_request=True),
    "smollm3": LayerKind(slides_on_request=True),
    "mistral": LayerKind(sliding_window=4096),
    "qwen3": LayerKind(normalizes_heads=True, sliding_window=4096, slides_on_request=True),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, norms_after=True, sliding_window=4096, eager_attention=True, caps_logits=True),
    "gemma3_text": replace(GEMMA, norms_after=True, normalizes_heads=True, num_rotary=2, sliding_window=4096),
}


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer in one micro-batch."""

    saved: int  # kept from the forward to the backward pass
    backward: int  # peak beyond ``saved`` during its backward pass, including the gradient of its output
    fetched_backward: int  # the same when the saved tensors are fetched from host memory
    saved_product: int  # the share of ``saved`` that is freed before its first parameter gradient is computed
    fetched_norm: int  # like ``fetched_backward``, at the end: in its first norm, when all its gradients exist
    product_gradient: int  # the share of ``backward`` that exists along with its first parameter gradient
    first_gradient: int  # its first parameter gradient, that of the feed-forward's last linear layer
    # Where the scores are materialized: the same at the backward pass of their softmax, else 0.
    attention_backward: int
    fetched_attention: int
    attention_gradient: int  # parameter gradients of the layer that exist by then


@dataclass(frozen=True)
class Workload:
    """The model and the micro-batch, which determine the sizes of activations."""

    shape: ModelShape
    precision: str
    num_sequences: int  # per micro-batch
    sequence_length: int
    has_mask: bool = False  # attention does not cross document boundaries
    sliding_window: int | None = None  # of the layers that have one; None: no layer has
    caps_scores: bool = True  # in families that can
    caps_logits: bool = False

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape) -> Workload:
        """The workload of one micro-batch of a run."""
        extra, family = config.model.extra, MODELED.get(shape.model_type, LayerKind())
        return cls(
            shape,
            config.train.precision,
            config.micro_batch_size,
            config.train.sequence_length,
            config.data.within_documents,
            sliding_window(config, shape),
            extra.get("attn_logit_softcapping", True) is not None,
            extra.get("final_logit_softcapping", family.caps_logits or None) is not None,
        )

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.sequence_length

    @property
    def width(self) -> int:
        return WEIGHT_BYTES[self.precision]

    @property
    def mask_bytes(self) -> int:
        """Boolean mask, one byte per entry: ``N S`` within documents, or one shared ``S S`` for a sliding window.

        Where the scores are materialized: two additive masks ``w N S``, of layers with and without a window.
        """
        if MODELED[self.shape.model_type].eager_attention:
            return 2 * self.width * self.num_tokens * self.sequence_length
        slides = self.sliding_window is not None and self.sliding_window <= self.sequence_length
        return self.sequence_length * (self.num_tokens if self.has_mask else self.sequence_length * slides)

    @property
    def num_scores(self) -> int:
        """``N h S``: the scores of all heads, where they are materialized."""
        is_eager = MODELED[self.shape.model_type].eager_attention
        return self.num_tokens * self.shape.num_attention_heads * self.sequence_length * is_eager

    @property
    def stream_bytes(self) -> int:
        """``w N d``: the hidden states between two layers."""
        return self.width * self.num_tokens * self.shape.hidden_size

    @property
    def feed_forward_bytes(self) -> int:
        """``w N f``: one of the tensors inside the feed-forward block."""
        return self.width * self.num_tokens * self.shape.linear("gate_proj").out_features

    @property
    def forward_bytes(self) -> int:
        """Peak inside a layer of a forward pass that saves nothing: ``4 w N d + max(3 w N f, attention)``."""
        q, k = (self.shape.linear(name).out_features for name in ("q_proj", "k_proj"))
        attention = self.width * self.num_tokens * (3 * q + 4 * k)
        if self.num_scores:  # before the softmax, in fp32 if they are not, and after it
            attention += self.mask_bytes + (8 + (self.width if self.width < 4 else 0)) * self.num_scores
        elif self.mask_bytes:
            attention += (self.width + 1) * self.num_tokens * self.sequence_length
        return 4 * self.stream_bytes + max(3 * self.feed_forward_bytes, attention)

    @property
    def batch_bytes(self) -> int:
        """Tokens and labels ``16 N``; rotary cosines and sines ``2 w S q/h``, and their frequencies.

        With a document mask, also the positions ``8 N``.
        """
        shape, S = self.shape, self.sequence_length
        head_dim = shape.query_size // shape.num_attention_heads
        rows = self.num_tokens if self.has_mask else S
        positions = 8 * self.num_tokens if self.has_mask else 0
        rotary = 2 * self.width * rows * head_dim + 4 * (head_dim + 2)
        return 16 * self.num_tokens + rotary * MODELED[shape.model_type].num_rotary + positions


def recomputes(config: RunConfig, role: Role) -> bool:
    """Whether ``train.gradient_checkpointing`` covers layers of this role."""
    return config.train.gradient_checkpointing in (True, "new" if isinstance(role, Trained) else "frozen")


def sliding_window(config: RunConfig, shape: ModelShape) -> int | None:
    """The attention window of the layers that have one, in tokens; None if no layer has."""
    family, extra = MODELED.get(shape.model_type, LayerKind()), config.model.extra
    window = extra.get("sliding_window", family.sliding_window)
    slides = True
    if family.slides_on_request:
        first = extra.get("max_window_layers", 28) if shape.model_type.startswith("qwen") else 0
        slides = extra.get("use_sliding_window", False) and first < shape.num_hidden_layers
    if (types := extra.get("layer_types")) is not None:
        slides = "sliding_attention" in types
    return window if isinstance(window, int) and slides else None


def is_modeled(shape: ModelShape) -> bool:
    """Whether this module can count the layers of this family."""
    return shape.model_type in MODELED


def norm_saved(work: Workload, size: int | None = None, rows_per_token: int = 1, *, trained: bool) -> int:
    """Bytes a norm saves: ``4 N d`` fp32 input, ``4 N`` scale, and ``w N d`` for the gradient of a trained weight.

    Gemma multiplies by 1 + weight in fp32: ``4 N d`` for the gradient of the weight, and ``4 d`` for 1 + weight.

    Args:
        size: elements of a row; default: d.
    """
    size, rows = size or work.shape.hidden_size, work.num_tokens * rows_per_token
    if MODELED[work.shape.model_type].fp32_norm_weights:
        return (4 + 4 * trained) * rows * size + 4 * rows + 4 * size
    return (4 + work.width * trained) * rows * size + 4 * rows


def norm_backward(work: Workload) -> int:
    """Backward workspace of a norm: four fp32 tensors of ``4 N d``, and the incoming gradient if not one of them."""
    incoming = 0 if MODELED[work.shape.model_type].fp32_norm_weights else work.stream_bytes
    return 16 * work.num_tokens * work.shape.hidden_size + incoming


def layer_activations(work: Workload, role: Role) -> LayerActivations:
    """Activations of a fully trained layer, or of a frozen one with or without an adapter.

    Saved tensors: two norms (four with norms after attention and feed-forward), ``w N (2 q + 2 k) + 4 N h`` of the
    attention (query, key, value, output and log-sum-exp), ``3 w N f`` of the feed-forward (gate, its activation, up),
    ``2 w N d + w N f`` for inputs of linear layers that need them for a gradient, and ``w N r`` for each adapter.
    """
    shape, w, N = work.shape, work.width, work.num_tokens
    family, trained = MODELED[shape.model_type], isinstance(role, Trained)
    adapted, r = (role.target_modules, role.rank) if isinstance(role, Adapter) else ((), 0)
    d = shape.hidden_size
    q, k = shape.linear("q_proj").out_features, shape.linear("k_proj").out_features
    inner, f = work.feed_forward_bytes, shape.linear("gate_proj").out_features

    def needs_input(*names: str) -> bool:
        return trained or any(name in adapted for name in names)

    attention = 2 * w * N * (q + k) + 4 * N * shape.num_attention_heads
    if work.num_scores:
        # Scores before the softmax (if capped), after it in fp32, and then in bf16.
        scores = (4 + w * work.caps_scores + (w if w < 4 else 0)) * work.num_scores
        attention = w * N * q * (3 + needs_input("o_proj")) + scores
    elif work.mask_bytes:
        attention += w * N * work.sequence_length  # each layer makes its own additive mask from the boolean one
    if family.normalizes_heads:
        head_dim = q // shape.num_attention_heads
        attention += sum(norm_saved(work, head_dim, size // head_dim, trained=trained) for size in (q, k))
    saved = (4 if family.norms_after else 2) * norm_saved(work, trained=trained) + attention
    saved += work.stream_bytes * (needs_input("q_proj", "k_proj", "v_proj") + needs_input("gate_proj", "up_proj"))
    saved += inner * (3 + needs_input("down_proj")) + w * N * r * len(adapted)

    # The peak of the backward pass: the elementwise product in the feed-forward passes its gradient to both factors.
    # Its own value, if it was saved, has been freed by then.
    backward = work.stream_bytes + inner * (3 - needs_input("down_proj"))
    first_gradient = 0
    if trained:
        first_gradient = w * f * d
    elif "down_proj" in adapted:
        first_gradient = w * r * (d + f)
        backward -= w * N * r
    # With a narrow feed-forward, the peak is in the backward pass of the norm before it.
    norm = work.stream_bytes + 16 * N * d - inner * (3 + needs_input("down_proj"))
    if family.norms_after:  # the norm after the feed-forward runs backward first, before anything else is freed
        backward -= norm_saved(work, trained=trained)
        norm = work.stream_bytes + 16 * N * d
    product_gradient = work.stream_bytes + inner
    return LayerActivations(
        saved=saved,
        backward=max(backward, norm, product_gradient),
        fetched_backward=work.stream_bytes + 5 * inner,
        # Layers with norms after the blocks hold two more gradients of hidden states: an upper bound, from simulation.
        fetched_norm=work.stream_bytes * (3 if family.norms_after else 1) + 24 * N * d,
        saved_product=inner * needs_input("down_proj"),
        product_gradient=product_gradient,
        first_gradient=first_gradient,
        **_at_the_softmax(work, role, saved),
    )


def _at_the_softmax(work: Workload, role: Role, saved: int) -> dict[str, int]:
    """Fields about the backward pass of the scores' softmax: its output, its gradient and its input's, all fp32.

    Also there are the scores from before the softmax, query, key, the value's gradient, and what was saved earlier.
    """
    if not work.num_scores:
        return {"attention_backward": 0, "fetched_attention": 0, "attention_gradient": 0}
    shape, w, N, trained = work.shape, work.width, work.num_tokens, isinstance(role, Trained)
    adapted, rank = adapted_linears(shape, role), role.rank if isinstance(role, Adapter) else 0
    before = {linear: linear.last_name in ("q_proj", "k_proj", "v_proj") for linear in shape.linears}
    q = w * N * shape.linear("q_proj").out_features
    fetched = work.stream_bytes + q + 12 * work.num_scores
    inputs = sum(before[linear] for linear in adapted)
    held = fetched + 2 * q + w * work.caps_scores * work.num_scores + norm_saved(work, trained=trained)
    held += work.stream_bytes * (trained or inputs > 0) + w * N * rank * inputs
    gradients = sum(rank * (each.in_features + each.out_features) for each in adapted if not before[each])
    if trained:
        gradients = sum(linear.num_parameters for linear in shape.linears if not before[linear])
        gradients += shape.other_layer_parameters - shape.hidden_size
    return {
        "attention_backward": max(held - saved, 0),
        "fetched_attention": fetched,
        "attention_gradient": w * gradients,
    }
