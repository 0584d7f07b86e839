"""Planned bytes: the formula, term by term."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.errors import ConfigError
from steplm.memory.estimate import adapter_matrices_per_layer, estimate_stage, resolve_target_modules
from steplm.memory.terms import KINDS, OUTER_COMPONENTS, WEIGHT_BYTES
from steplm.planner.shape import FAMILIES, shape_from_hf_config
from steplm.types import ModelShape

LAYERS = {"num_new_layers": st.integers(1, 50), "num_frozen_layers": st.integers(0, 50)}


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    heads = draw(st.sampled_from([1, 2, 4]))
    return shape_from_hf_config(
        {
            "model_type": draw(st.sampled_from(list(FAMILIES))),
            "vocab_size": draw(st.integers(1, 1000)),
            "hidden_size": heads * draw(st.sampled_from([2, 8, 16])),
            "intermediate_size": draw(st.integers(1, 100)),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "tie_word_embeddings": draw(st.booleans()),
        }
    )


@given(shape=shapes(), **LAYERS, e=st.integers(0, 10**6))
def test_bf16_takes_sixteen_bytes_trained_and_two_frozen(
    shape: ModelShape, num_new_layers: int, num_frozen_layers: int, e: int
) -> None:
    counts = {
        "num_new_layers": num_new_layers,
        "num_frozen_layers": num_frozen_layers,
        "adapter_matrices": [e],
    }
    p, outer = shape.layer_parameters, shape.outer_parameters
    bare = 16 * num_new_layers * p + 2 * num_frozen_layers * p + 16 * num_frozen_layers * e
    assert estimate_stage(shape, precision="bf16", **counts, count_outer=False).total_bytes == bare
    assert estimate_stage(shape, precision="bf16", **counts).total_bytes == bare + 16 * outer
    assert estimate_stage(shape, precision="bf16", **counts, outer="frozen").total_bytes == bare + 2 * outer


@given(shape=shapes(), **LAYERS, e=st.integers(0, 10**6))
def test_fp32_takes_sixteen_bytes_trained_and_four_frozen(
    shape: ModelShape, num_new_layers: int, num_frozen_layers: int, e: int
) -> None:
    estimate = estimate_stage(
        shape,
        precision="fp32",
        num_new_layers=num_new_layers,
        num_frozen_layers=num_frozen_layers,
        adapter_matrices=[e],
    )
    p, outer = shape.layer_parameters, shape.outer_parameters
    trained = num_new_layers * p + num_frozen_layers * e + outer
    assert estimate.total_bytes == 16 * trained + 4 * num_frozen_layers * p
    assert estimate.bytes_of(kind="optimizer") == 2 * estimate.bytes_of(kind="gradients") == 8 * trained


@given(shape=shapes(), **LAYERS, e=st.integers(1, 10**6), precision=st.sampled_from(list(WEIGHT_BYTES)))
def test_bytes_grow_with_every_count_and_no_term_is_negative(
    shape: ModelShape, num_new_layers: int, num_frozen_layers: int, e: int, precision: str
) -> None:
    def total(new: int, frozen: int, adapters: int) -> int:
        estimate = estimate_stage(
            shape,
            precision=precision,
            num_new_layers=new,
            num_frozen_layers=frozen,
            adapter_matrices=[adapters],
        )
        assert all(term.num_bytes > 0 for term in estimate.terms)
        assert estimate.total_bytes == sum(estimate.bytes_of(kind=kind) for kind in KINDS)
        return estimate.total_bytes

    here = total(num_new_layers, num_frozen_layers, e)
    assert total(num_new_layers + 1, num_frozen_layers, e) > here
    assert total(num_new_layers, num_frozen_layers + 1, e) > here
    assert total(num_new_layers, num_frozen_layers + 1, e + 1) > total(num_new_layers, num_frozen_layers + 1, e)


def test_every_term_appears_where_everything_is_there() -> None:
    shape = shape_from_hf_config({"model_type": "llama"})
    estimate = estimate_stage(shape, precision="bf16", num_new_layers=1, num_frozen_layers=1, adapter_matrices=[1])
    expected = [(component, kind) for component in COMPONENTS for kind in KINDS]
    for kind in ("gradients", "optimizer"):
        expected.remove(("frozen_layers", kind))
    assert [(term.component, term.kind) for term in estimate.terms] == expected


def test_every_term_names_its_formula_with_the_unit_and_tells_its_source() -> None:
    shape = shape_from_hf_config({"model_type": "llama"})
    estimate = estimate_stage(shape, precision="bf16", num_new_layers=1, num_frozen_layers=1, adapter_matrices=[1])
    for term in estimate.terms:
        assert term.formula.endswith(f"× {term.num_bytes // term.num_parameters} B")
    assert all(group.__doc__ for groups in COMPONENTS.values() for group in groups)
    assert all(kind.__doc__ for kind in KINDS.values())


def test_a_tied_head_is_counted_once() -> None:
    tied = shape_from_hf_config({"model_type": "llama", "tie_word_embeddings": True})
    untied = shape_from_hf_config({"model_type": "llama", "tie_word_embeddings": False})
    sizes = [estimate_stage(shape, precision="bf16", num_new_layers=1) for shape in (tied, untied)]
    assert sizes[0].bytes_of("head") == 0
    assert sizes[1].total_bytes - sizes[0].total_bytes == 16 * 32000 * 4096


def test_outer_components_can_be_left_out() -> None:
    shape = shape_from_hf_config({"model_type": "llama"})
    estimate = estimate_stage(shape, precision="bf16", num_new_layers=2, count_outer=False)
    assert not {term.component for term in estimate.terms} & set(OUTER_COMPONENTS)


def test_lora_of_rank_128_on_a_368m_layer_has_the_known_number_of_parameters() -> None:
    shape = shape_from_hf_config(
        {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2736, "num_attention_heads": 16}
    )
    assert shape.layer_parameters == 12_601_344
    assert sum(adapter_matrices_per_layer(shape, 128, "all-linear")) == 2_492_416
    assert sum(adapter_matrices_per_layer(shape, 8, ["q_proj", "down_proj"])) == 8 * (1024 + 1024 + 2736 + 1024)


def test_the_rank_is_checked_against_the_chosen_targets_only() -> None:
    shape = shape_from_hf_config(
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    )
    assert sum(adapter_matrices_per_layer(shape, 64, ["q_proj"])) == 64 * 128
    with pytest.raises(ConfigError, match=r"pet\.rank=17 .* 16, of self_attn\.k_proj \(16 x 64\)"):
        adapter_matrices_per_layer(shape, 17, ["q_proj", "k_proj"])


def test_targets_come_in_the_layers_order_and_fused_maps_are_known() -> None:
    shape = shape_from_hf_config({"model_type": "phi3"})
    assert resolve_target_modules(shape, "all-linear") == ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")
    assert resolve_target_modules(shape, ["down_proj", "o_proj"]) == ("o_proj", "down_proj")


def test_an_unknown_precision_is_refused() -> None:
    shape = shape_from_hf_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"no precision 'fp8'\. Known: bf16, fp32"):
        estimate_stage(shape, precision="fp8", num_new_layers=1)
