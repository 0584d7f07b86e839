"""FLOPs per token: textbook values, and what freezing saves."""

from __future__ import annotations

import pytest

from steplm.cost.flops import training_flops_per_token
from steplm.planner.shape import shape_from_hf_config

SHAPE = shape_from_hf_config(
    {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
    }
)
MATRICES = 4 * 16 * 16 + 3 * 16 * 40
HEAD = 100 * 16


def test_ordinary_training_costs_six_per_matrix_parameter_and_twelve_for_attention() -> None:
    flops = training_flops_per_token(SHAPE, sequence_length=32, num_new_layers=6)
    assert flops == 6 * (6 * MATRICES + HEAD) + 12 * 6 * 32 * 16


def test_a_frozen_matrix_saves_a_third_and_attention_nothing() -> None:
    trained = training_flops_per_token(SHAPE, sequence_length=32, num_new_layers=6)
    frozen = training_flops_per_token(SHAPE, sequence_length=32, num_new_layers=2, num_frozen_layers=4)
    assert trained - frozen == 4 * 2 * MATRICES


def test_an_adapter_costs_six_per_parameter() -> None:
    without = training_flops_per_token(SHAPE, sequence_length=32, num_new_layers=2, num_frozen_layers=4)
    adapted = training_flops_per_token(
        SHAPE, sequence_length=32, num_new_layers=2, num_frozen_layers=4, adapter_parameters=10
    )
    assert adapted - without == 6 * 4 * 10


def test_layers_below_the_lowest_trained_tensor_are_only_run_forward() -> None:
    counts = {"sequence_length": 32, "num_new_layers": 2, "num_frozen_layers": 4, "train_outer": False}
    whole = training_flops_per_token(SHAPE, **counts)
    spared = training_flops_per_token(SHAPE, **counts, num_layers_without_backward=3)
    assert whole - spared == 3 * (2 * MATRICES + 8 * 32 * 16)


def test_a_frozen_head_gets_no_weight_gradient() -> None:
    trained = training_flops_per_token(SHAPE, sequence_length=32, num_new_layers=6)
    frozen = training_flops_per_token(SHAPE, sequence_length=32, num_new_layers=6, train_outer=False)
    assert trained - frozen == 2 * HEAD


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_multiplies_as_much_as_an_untied_one(tied: bool) -> None:
    shape = shape_from_hf_config({"model_type": "gemma", "num_hidden_layers": 2, "tie_word_embeddings": tied})
    head = 6 * shape.vocab_size * shape.hidden_size
    layers = 6 * 2 * sum(linear.in_features * linear.out_features for linear in shape.linears)
    # Gemma's heads together are wider than its hidden states.
    attention = 12 * 2 * 64 * (16 * 256)
    assert training_flops_per_token(shape, sequence_length=64, num_new_layers=2) == head + layers + attention
