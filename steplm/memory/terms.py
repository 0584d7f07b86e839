"""The terms of model-state memory: one function per (component, kind).

Symbols, as in the formulas: ``n_i`` layers added in stage i, ``N_{i-1}`` layers before it, ``P_layer``
parameters of one layer, ``E`` adapter parameters of one layer. Layers and adapters follow STEP
(arXiv 2504.04151), section 2.2; embeddings, final norm and head, which that formula leaves out,
follow the same rule. To add a term, write a function and add a line to ``TERMS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from steplm.types import MemoryTerm, ModelShape

# Bytes per trained parameter. Optimizer: fp32 first and second moment, and for bf16 the fp32 master weight.
BYTES_PER_PARAMETER: dict[str, dict[str, int]] = {
    "bf16": {"weights": 2, "gradients": 2, "optimizer": 12},
    "fp32": {"weights": 4, "gradients": 4, "optimizer": 8},
}

OUTER_COMPONENTS = ("embeddings", "final_norm", "head")


@dataclass(frozen=True)
class StageCounts:
    """All that a term may depend on."""

    shape: ModelShape
    precision: str
    num_new_layers: int  # n_i; every layer that is trained as a whole
    num_frozen_layers: int  # N_{i-1}
    adapter_parameters: int  # E, of one frozen layer
    train_outer: bool

    @property
    def new_parameters(self) -> int:
        return self.num_new_layers * self.shape.layer_parameters

    @property
    def adapter_parameters_in_all(self) -> int:
        return self.num_frozen_layers * self.adapter_parameters


def new_layers_weights(counts: StageCounts) -> MemoryTerm:
    """``n_i P_layer`` weights in the precision of the forward pass. STEP, section 2.2."""
    return _term(counts, "new_layers", "weights", counts.new_parameters, "n_i × P_layer")


def new_layers_gradients(counts: StageCounts) -> MemoryTerm:
    """``n_i P_layer`` gradients, of the weights' type. STEP, section 2.2."""
    return _term(counts, "new_layers", "gradients", counts.new_parameters, "n_i × P_layer")


def new_layers_optimizer(counts: StageCounts) -> MemoryTerm:
    """``n_i P_layer`` times the fp32 states of Adam (arXiv 1412.6980). STEP, section 2.2."""
    return _term(counts, "new_layers", "optimizer", counts.new_parameters, "n_i × P_layer")


def frozen_layers_weights(counts: StageCounts) -> MemoryTerm:
    """``N_{i-1} P_layer`` weights, without gradient or state. STEP, section 2.2."""
    num_parameters = counts.num_frozen_layers * counts.shape.layer_parameters
    return _term(counts, "frozen_layers", "weights", num_parameters, "N_{i-1} × P_layer")


def adapters_weights(counts: StageCounts) -> MemoryTerm:
    """``N_{i-1} E`` weights; LoRA (arXiv 2106.09685) has ``E = Σ rank (in + out)``. STEP, section 2.2."""
    return _term(counts, "adapters", "weights", counts.adapter_parameters_in_all, "N_{i-1} × E")


def adapters_gradients(counts: StageCounts) -> MemoryTerm:
    """``N_{i-1} E`` gradients, of the weights' type. STEP, section 2.2."""
    return _term(counts, "adapters", "gradients", counts.adapter_parameters_in_all, "N_{i-1} × E")


def adapters_optimizer(counts: StageCounts) -> MemoryTerm:
    """``N_{i-1} E`` times the fp32 states of Adam. STEP, section 2.2."""
    return _term(counts, "adapters", "optimizer", counts.adapter_parameters_in_all, "N_{i-1} × E")


def embeddings_weights(counts: StageCounts) -> MemoryTerm:
    """``vocab_size × hidden_size`` weights; a head that shares them counts here, once."""
    return _term(counts, "embeddings", "weights", counts.shape.embedding_parameters, "P_embeddings")


def embeddings_gradients(counts: StageCounts) -> MemoryTerm:
    """A dense gradient of every embedding, where they are trained."""
    return _outer_if_trained(counts, "embeddings", "gradients", counts.shape.embedding_parameters)


def embeddings_optimizer(counts: StageCounts) -> MemoryTerm:
    """The fp32 states of Adam for every embedding, where they are trained."""
    return _outer_if_trained(counts, "embeddings", "optimizer", counts.shape.embedding_parameters)


def final_norm_weights(counts: StageCounts) -> MemoryTerm:
    """``hidden_size`` weights of the norm above the last layer."""
    return _term(counts, "final_norm", "weights", counts.shape.final_norm_parameters, "P_final_norm")


def final_norm_gradients(counts: StageCounts) -> MemoryTerm:
    """Their gradients, where they are trained."""
    return _outer_if_trained(counts, "final_norm", "gradients", counts.shape.final_norm_parameters)


def final_norm_optimizer(counts: StageCounts) -> MemoryTerm:
    """Their fp32 states of Adam, where they are trained."""
    return _outer_if_trained(counts, "final_norm", "optimizer", counts.shape.final_norm_parameters)


def head_weights(counts: StageCounts) -> MemoryTerm:
    """``hidden_size × vocab_size`` weights of an untied head."""
    return _term(counts, "head", "weights", counts.shape.head_parameters, "P_head")


def head_gradients(counts: StageCounts) -> MemoryTerm:
    """Gradients of an untied head, where it is trained."""
    return _outer_if_trained(counts, "head", "gradients", counts.shape.head_parameters)


def head_optimizer(counts: StageCounts) -> MemoryTerm:
    """The fp32 states of Adam for an untied head, where it is trained."""
    return _outer_if_trained(counts, "head", "optimizer", counts.shape.head_parameters)


TERMS: dict[tuple[str, str], Callable[[StageCounts], MemoryTerm]] = {
    ("new_layers", "weights"): new_layers_weights,
    ("new_layers", "gradients"): new_layers_gradients,
    ("new_layers", "optimizer"): new_layers_optimizer,
    ("frozen_layers", "weights"): frozen_layers_weights,
    ("adapters", "weights"): adapters_weights,
    ("adapters", "gradients"): adapters_gradients,
    ("adapters", "optimizer"): adapters_optimizer,
    ("embeddings", "weights"): embeddings_weights,
    ("embeddings", "gradients"): embeddings_gradients,
    ("embeddings", "optimizer"): embeddings_optimizer,
    ("final_norm", "weights"): final_norm_weights,
    ("final_norm", "gradients"): final_norm_gradients,
    ("final_norm", "optimizer"): final_norm_optimizer,
    ("head", "weights"): head_weights,
    ("head", "gradients"): head_gradients,
    ("head", "optimizer"): head_optimizer,
}


def _term(counts: StageCounts, component: str, kind: str, num_parameters: int, formula: str) -> MemoryTerm:
    num_bytes = BYTES_PER_PARAMETER[counts.precision][kind]
    return MemoryTerm(component, kind, num_parameters, num_bytes, f"{formula} × {num_bytes} B")


def _outer_if_trained(counts: StageCounts, component: str, kind: str, num_parameters: int) -> MemoryTerm:
    return _term(counts, component, kind, num_parameters if counts.train_outer else 0, f"P_{component}")
