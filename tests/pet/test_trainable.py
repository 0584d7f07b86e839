import pytest
from torch import nn

from steplm.errors import PlanError
from steplm.pet.trainable import apply_trainable, trainable_names


def toy_model(tied: bool = False) -> nn.Module:
    model = nn.Module()
    model.embed_tokens = nn.Embedding(5, 3)
    model.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
    model.lm_head = nn.Linear(3, 5, bias=False)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def test_exactly_the_matching_parameters_are_trained_in_the_models_order():
    model = toy_model()
    trained = apply_trainable(model, ["lm_head.*", "layers.1.*"])
    assert trained == ["layers.1.weight", "layers.1.bias", "lm_head.weight"], "layer 1 is not layers 10 and 11"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert apply_trainable(model, ["embed_tokens.weight"]) == ["embed_tokens.weight"], "earlier choices are undone"
    assert trainable_names(model) == ["embed_tokens.weight"]


@pytest.mark.parametrize("pattern", ["lm_head.weight", "embed_tokens.weight"])
def test_a_tied_parameter_is_named_once_whichever_of_its_names_matches(pattern):
    assert apply_trainable(toy_model(tied=True), [pattern]) == ["embed_tokens.weight"]


def test_a_tied_parameter_is_trained_even_if_only_one_of_its_names_matches():
    model = toy_model(tied=True)
    assert apply_trainable(model, ["layers.*", "lm_head.*"])[0] == "embed_tokens.weight"
    assert model.lm_head.weight.requires_grad


def test_a_pattern_that_matches_nothing_is_refused_and_changes_nothing():
    model = toy_model()
    with pytest.raises(PlanError, match=r"1 of the plan's 2 trained patterns .* layers\.12\.\*") as error:
        apply_trainable(model, ["layers.1.*", "layers.12.*"])
    assert error.value.patterns == ["layers.12.*"]
    assert len(trainable_names(model)) == 26


def test_no_patterns_train_nothing():
    assert apply_trainable(toy_model(), []) == []
