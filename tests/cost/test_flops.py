"""FLOPs per token: textbook values, and what freezing saves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from steplm.cost.flops import training_flops_per_token
from steplm.planner.shape import shape_from_hf_config
from steplm.schedule import Adapter, Frozen, Phase, Trained

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


FlopsOf = Callable[..., int]


@pytest.fixture
def flops_of(make_phase: Callable[..., Phase]) -> FlopsOf:
    """``flops_of(layers, outside)``: a token of a phase with these roles, in sequences of 32."""
    return lambda *roles: training_flops_per_token(SHAPE, make_phase(*roles), 32)


def test_ordinary_training_costs_six_per_matrix_parameter_and_twelve_for_attention(flops_of: FlopsOf) -> None:
    assert flops_of([Trained()] * 6) == 6 * (6 * MATRICES + HEAD) + 12 * 6 * 32 * 16


def test_a_frozen_matrix_saves_a_third_and_attention_nothing(flops_of: FlopsOf) -> None:
    frozen = flops_of({Trained(): 2, Frozen(): 4})
    assert flops_of([Trained()] * 6) - frozen == 4 * 2 * MATRICES


def test_an_adapter_costs_six_per_parameter_whatever_the_others_have(flops_of: FlopsOf) -> None:
    without = flops_of({Trained(): 2, Frozen(): 4})
    small, large = Adapter(2, 1.0, ("q_proj",)), Adapter(3, 1.0, ("q_proj", "down_proj"))
    assert flops_of({Trained(): 2, small: 4}) - without == 6 * 4 * 2 * (16 + 16)
    mixed = flops_of([small, Trained(), large, Frozen(), large, Trained()])
    assert mixed - without == 6 * (2 * 32 + 2 * 3 * (32 + 56))


def test_layers_below_the_lowest_trained_tensor_are_only_run_forward(flops_of: FlopsOf) -> None:
    whole = flops_of([Trained(), Frozen(), Frozen(), Frozen(), Frozen(), Trained()], Frozen())
    spared = flops_of([Frozen(), Frozen(), Frozen(), Trained(), Frozen(), Trained()], Frozen())
    assert whole - spared == 3 * (2 * MATRICES + 8 * 32 * 16)
    adapted = flops_of([Adapter(1, 1.0, ("q_proj",)), Frozen(), Frozen(), Trained(), Frozen(), Trained()], Frozen())
    assert adapted - whole == 6 * 32, "an adapter is reached too"


def test_a_frozen_head_gets_no_weight_gradient(flops_of: FlopsOf) -> None:
    assert flops_of([Trained()] * 6) - flops_of([Trained()] * 6, Frozen()) == 2 * HEAD


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_multiplies_as_much_as_an_untied_one(make_phase: Callable[..., Phase], tied: bool) -> None:
    shape = shape_from_hf_config({"model_type": "gemma", "num_hidden_layers": 2, "tie_word_embeddings": tied})
    head = 6 * shape.vocab_size * shape.hidden_size
    layers = 6 * 2 * sum(linear.in_features * linear.out_features for linear in shape.linears)
    # Gemma's heads together are wider than its hidden states.
    attention = 12 * 2 * 64 * (16 * 256)
    assert training_flops_per_token(shape, make_phase([Trained()] * 2), 64) == head + layers + attention
