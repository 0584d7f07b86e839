"""Floating-point operations of training, per token."""

from __future__ import annotations

from math import prod

from steplm.config import RunConfig
from steplm.cost.activations import recomputes
from steplm.cost.formats import NEWTON_SCHULZ_STEPS
from steplm.cost.terms import adapter_shapes
from steplm.schedule import Adapter, Phase, Role, Trained
from steplm.types import ModelShape


def training_flops_per_token(shape: ModelShape, phase: Phase, sequence_length: int) -> int:
    """Forward and backward FLOPs of one step of a phase, divided by its tokens.

    With ``M`` matrix parameters per layer, ``H = vocab_size × hidden_size`` in the head, ``E`` adapter parameters per
    frozen layer, ``N`` layers of which ``n`` are trained, ``F`` frozen and ``N_b`` reached by the backward pass,
    attention width ``A = num_attention_heads × head_dim`` and sequence length ``S``:

        forward                   2 (N M + F E + H) + 4 N S A
        backward, activations     2 (N_b M + F E + H) + 8 N_b S A
        backward, weights         2 (n M + F E), and 2 H where the head is trained

    Full training therefore costs the well-known ``6 × matrix parameters + 12 N S A``. A frozen matrix passes
    gradients on but gets none itself, which saves a third of its FLOPs. The backward pass stops at the lowest trained
    tensor; see ``Phase.num_layers_without_backward``. Adapters on the head count like those of a layer.

    These are model FLOPs: embedding lookup, norms and softmax are excluded, the causal mask saves nothing, and
    recomputed activations are not counted twice.

    Source: Kaplan et al. (arXiv 2001.08361), section 2.1; attention: PaLM (arXiv 2204.02311), appendix B.
    """
    num_layers, outside = phase.num_hidden_layers, phase.embeddings_and_head
    num_backward_layers = num_layers - phase.num_layers_without_backward
    layer_matrices = shape.linear_weights
    head = shape.vocab_size * shape.hidden_size
    head_rank = outside.rank if isinstance(outside, Adapter) else 0
    adapters = sum(count * _adapter_parameters(shape, role) for role, count in phase.groups.items())
    adapters += head_rank * (shape.vocab_size + shape.hidden_size)
    attention = _attention(shape, sequence_length)

    forward = 2 * (num_layers * layer_matrices + adapters + head) + num_layers * attention
    backward_activations = (
        2 * (num_backward_layers * layer_matrices + adapters + head) + 2 * num_backward_layers * attention
    )
    trained_head = head if isinstance(outside, Trained) else 0
    backward_weights = 2 * (len(phase.trained_layers) * layer_matrices + adapters + trained_head)
    return forward + backward_activations + backward_weights


def recomputed_flops_per_token(shape: ModelShape, phase: Phase, config: RunConfig) -> int:
    """FLOPs of the second forward pass of the layers that ``train.gradient_checkpointing`` covers."""
    flops = 0
    for role, count in phase.groups.items():
        if recomputes(config, role):
            each = 2 * (shape.linear_weights + _adapter_parameters(shape, role))
            flops += count * (each + _attention(shape, config.train.sequence_length))
    return flops


def newton_schulz_flops(rows: int, columns: int) -> int:
    """FLOPs of Newton–Schulz in Muon's update of one matrix with sides s ≤ l.

    Each step computes X Xᵀ and its product with X (2 s² l each), and (X Xᵀ)² (2 s³).
    """
    s, l = sorted((rows, columns))  # noqa: E741
    return NEWTON_SCHULZ_STEPS * (4 * s * s * l + 2 * s**3)


def _attention(shape: ModelShape, sequence_length: int) -> int:
    """Attention FLOPs per token of the forward pass of one layer."""
    return 4 * sequence_length * shape.query_size


def _adapter_parameters(shape: ModelShape, role: Role) -> int:
    return sum(map(prod, adapter_shapes(shape, role))) if isinstance(role, Adapter) else 0
