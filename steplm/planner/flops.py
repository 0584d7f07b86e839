"""Floating-point operations of training, per token."""

from __future__ import annotations

from steplm.types import ModelShape


def training_flops_per_token(
    shape: ModelShape,
    *,
    sequence_length: int,
    num_new_layers: int,
    num_frozen_layers: int = 0,
    adapter_parameters: int = 0,
    train_outer: bool = True,
    head_rank: int = 0,
    num_layers_without_backward: int = 0,
) -> int:
    """Forward and backward operations of one stage's step, divided by its tokens.

    With ``M`` matrix parameters of a layer, ``H = vocab_size × hidden_size`` of the head, ``E`` adapter
    parameters of a frozen layer, ``N`` layers of which ``n`` are new, ``F`` frozen and ``N_b`` reached by the
    backward pass, attention width ``A = num_attention_heads × head_dim`` and sequence length ``S``:

        forward                   2 (N M + F E + H) + 4 N S A
        backward, activations     2 (N_b M + F E + H) + 8 N_b S A
        backward, weights         2 (n M + F E), and 2 H where the head is trained

    so that ordinary training costs the well-known ``6 × matrix parameters + 12 N S A``. A frozen matrix
    passes gradients on but gets none, which saves a third of its share. The backward pass goes down to
    the lowest trained tensor: all the way where embeddings are trained or every frozen layer has
    adapters, else ``num_layers_without_backward`` of the lowest layers are spared. Adapters of ``head_rank``
    on the head count like those of a layer.

    These are the model's operations: embedding look-up, norms and softmax are left out, the causal mask
    saves nothing, and recomputed activations are not counted twice.

    Source: Kaplan et al. (arXiv 2001.08361), section 2.1; attention: PaLM (arXiv 2204.02311), appendix B.
    """
    num_layers = num_new_layers + num_frozen_layers
    num_backward_layers = num_layers - num_layers_without_backward
    layer_matrices = sum(linear.in_features * linear.out_features for linear in shape.linears)
    head = shape.vocab_size * shape.hidden_size
    adapters = num_frozen_layers * adapter_parameters + head_rank * (shape.vocab_size + shape.hidden_size)
    attention = 4 * sequence_length * (shape.attention_size or shape.hidden_size)

    forward = 2 * (num_layers * layer_matrices + adapters + head) + num_layers * attention
    backward_activations = (
        2 * (num_backward_layers * layer_matrices + adapters + head) + 2 * num_backward_layers * attention
    )
    backward_weights = 2 * (num_new_layers * layer_matrices + adapters + (head if train_outer else 0))
    return forward + backward_activations + backward_weights
