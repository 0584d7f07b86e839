"""Every operator in OPERATORS must keep these promises: a new one is tested by being there."""

import pytest
import torch

from steplm.errors import GrowthError
from steplm.growth.grow import grow
from steplm.growth.operators import OPERATORS, Operator, require_row_wise
from steplm.rows import WHOLE, Rows
from steplm.types import LayerMap, LayerOrigin

BETWEEN = LayerMap(
    (
        LayerOrigin((0,)),
        LayerOrigin((0, 1), is_new=True, fraction=1 / 3),
        LayerOrigin((0, 1), is_new=True, fraction=2 / 3),
        LayerOrigin((1,)),
        LayerOrigin((1,), is_new=True),
    )
)


def toy_layer(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "self_attn.q_proj.weight": draw(4, 4),
        "self_attn.o_proj.weight": draw(4, 4),
        "self_attn.o_proj.bias": draw(4),
        "mlp.down_proj.weight": draw(4, 6).t().contiguous().t(),  # not contiguous: the result must be
        "input_layernorm.weight": draw(4),
    }


def toy_state(num_layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    layers = {
        f"model.layers.{i}.{name}": tensor for i in range(num_layers) for name, tensor in toy_layer(i, dtype).items()
    }
    return {
        "model.embed_tokens.weight": torch.randn(8, 4).to(dtype),
        **layers,
        "model.norm.weight": torch.ones(4, dtype=dtype),
    }


def fresh_layer(index: int) -> dict[str, torch.Tensor]:
    return toy_layer(100 + index, torch.float32)


def grow_toy(operator: str, state: dict[str, torch.Tensor], layer_map: LayerMap = BETWEEN) -> dict[str, torch.Tensor]:
    return grow(state, layer_map, operator, fresh_layer=fresh_layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_new_layers_have_the_names_shapes_and_dtypes_of_old_ones(operator, dtype):
    grown = grow_toy(operator, toy_state(dtype=dtype))
    kinds = [
        {
            name.removeprefix(f"model.layers.{i}."): (t.shape, t.dtype)
            for name, t in grown.items()
            if name.startswith(f"model.layers.{i}.")
        }
        for i in range(5)
    ]
    assert kinds == [{name: (t.shape, dtype) for name, t in toy_layer(0, dtype).items()}] * 5
    assert len(grown) == 5 * len(kinds[0]) + 2


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tensor_shares_storage_with_another_and_new_ones_are_contiguous(operator):
    state = toy_state()
    grown = grow_toy(operator, state)
    storages = [t.untyped_storage().data_ptr() for t in grown.values()]
    assert len(set(storages)) == len(storages)
    old = {t.untyped_storage().data_ptr() for t in state.values()}
    for name, tensor in grown.items():
        if name.startswith(("model.layers.1.", "model.layers.2.", "model.layers.4.")):
            assert tensor.untyped_storage().data_ptr() not in old
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        else:
            assert tensor.untyped_storage().data_ptr() in old


@pytest.mark.parametrize("operator", OPERATORS)
def test_growth_is_deterministic_and_leaves_its_input_alone(operator):
    state = toy_state()
    before = {name: t.clone() for name, t in state.items()}
    first, second = grow_toy(operator, state), grow_toy(operator, state)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("operator", OPERATORS)
def test_changing_a_grown_tensor_changes_no_other(operator):
    grown = grow_toy(operator, toy_state())
    new = {name: t for name, t in grown.items() if ".layers.1." in name or ".layers.2." in name}
    others = {name: t.clone() for name, t in grown.items() if name not in new}
    for tensor in new.values():
        tensor.fill_(7)
    assert all(torch.equal(grown[name], tensor) for name, tensor in others.items())


def test_interpolation_mean_of_two_layers_is_their_fp32_mean_rounded_once():
    layer_map = LayerMap((LayerOrigin((0,)), LayerOrigin((0, 1), is_new=True, fraction=0.5), LayerOrigin((1,))))
    state = toy_state()
    grown = grow_toy("interpolation_mean", state, layer_map)
    for name in toy_layer(0, torch.bfloat16):
        lower, upper = (state[f"model.layers.{i}.{name}"].double() for i in (0, 1))
        assert torch.equal(grown[f"model.layers.1.{name}"], ((lower + upper) / 2).bfloat16()), name


def test_interpolation_mean_stands_at_its_fraction_of_the_way():
    state = {
        "model.layers.0.norm.weight": torch.tensor([0.0, 3.0]),
        "model.layers.1.norm.weight": torch.tensor([3.0, 0.0]),
    }
    grown = grow_toy("interpolation_mean", state)
    assert torch.allclose(grown["model.layers.1.norm.weight"], torch.tensor([1.0, 2.0]))
    assert torch.allclose(grown["model.layers.2.norm.weight"], torch.tensor([2.0, 1.0]))
    assert torch.equal(grown["model.layers.4.norm.weight"], torch.tensor([3.0, 0.0])), "one parent: a copy"


@pytest.mark.parametrize("operator", ["interpolation", "stack"])
def test_copying_operators_take_the_lower_parent(operator):
    state = toy_state()
    grown = grow_toy(operator, state)
    for new, parent in ((1, 0), (2, 0), (4, 1)):
        for name in toy_layer(0, torch.bfloat16):
            assert torch.equal(grown[f"model.layers.{new}.{name}"], state[f"model.layers.{parent}.{name}"])


def test_identity_sets_output_projections_to_zero_and_copies_the_rest():
    state = toy_state()
    grown = grow_toy("identity", state)
    zero = {"self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight"}
    for name in toy_layer(0, torch.bfloat16):
        new, old = grown[f"model.layers.1.{name}"], state[f"model.layers.0.{name}"]
        assert torch.equal(new, torch.zeros_like(old) if name in zero else old), name


def test_identity_refuses_a_layer_whose_output_projections_it_does_not_know():
    state = {f"model.layers.{i}.mixer.projection.weight": torch.ones(2, 2) for i in range(2)}
    with pytest.raises(GrowthError, match=r"none of .*o_proj.* is among mixer\.projection\.weight"):
        grow_toy("identity", state)


def test_identity_zeroes_experts_that_are_one_tensor_and_shared_ones():
    names = ("mlp.experts.down_proj", "mlp.experts.down_proj_bias", "mlp.shared_experts.down_proj.weight")
    kept = "mlp.experts.gate_up_proj"
    state = {f"model.layers.{i}.{name}": torch.ones(2, 3, 4) for i in range(2) for name in (*names, kept)}
    grown = grow_toy("identity", state)
    assert all(grown[f"model.layers.1.{name}"].count_nonzero() == 0 for name in names)
    assert torch.equal(grown[f"model.layers.1.{kept}"], torch.ones(2, 3, 4))


def test_a_mean_of_what_is_no_number_is_the_lower_parents():
    state = {f"model.layers.{i}.mask": torch.tensor([i, 1, 7]) for i in range(2)}
    assert torch.equal(grow_toy("interpolation_mean", state)["model.layers.1.mask"], torch.tensor([0, 1, 7]))


def test_random_takes_each_new_layer_from_fresh_layer_in_the_models_dtype():
    grown = grow_toy("random", toy_state())
    for index in (1, 2, 4):
        for name, tensor in fresh_layer(index).items():
            assert torch.equal(grown[f"model.layers.{index}.{name}"], tensor.bfloat16())


def test_random_without_fresh_layer_is_refused():
    with pytest.raises(GrowthError, match="fresh_layer"):
        grow(toy_state(), BETWEEN, "random")


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_grow_into_the_rows_of_the_whole(name: str) -> None:
    """So a rank can grow its own rows alone, unless an operator declares that it mixes them."""
    assert not OPERATORS[name].mixes_rows
    generator = torch.Generator().manual_seed(0)
    names = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
    parents = [{key: torch.randn((6, 4) if "proj" in key else 6, generator=generator) for key in names} for _ in "ab"]
    rows = Rows(1, 2)
    cut = [{key: rows.cut(tensor) for key, tensor in parent.items()} for parent in parents]
    whole, own = (OPERATORS[name].function(layers, 0.5) for layers in (parents, cut))
    assert all(torch.equal(rows.cut(whole[key]), own[key]) for key in names)


def test_an_operator_that_mixes_rows_is_refused_where_they_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = Operator(lambda parents, fraction: {k: t.flip(0) for k, t in parents[0].items()}, mixes_rows=True)
    monkeypatch.setitem(OPERATORS, "mixing", mixing)
    require_row_wise("mixing", WHOLE)
    with pytest.raises(GrowthError, match=r"each of 2 ranks has only its own: set distributed\.shard_size=1"):
        require_row_wise("mixing", Rows(0, 2))
