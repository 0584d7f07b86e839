"""Planned bytes: the formula, term by term."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steplm.config import MemoryConfig
from steplm.errors import ConfigError
from steplm.cost.estimate import adapter_shapes_per_layer, estimate_stage, resolve_target_modules
from steplm.cost.terms import COMPONENTS, KINDS, OUTER_COMPONENTS, WEIGHT_BYTES
from steplm.planner.shape import FAMILIES, shape_from_hf_config
from steplm.types import HOST, MemoryEstimate, ModelShape

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
        "adapter_shapes": [(e, 1)],
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
        adapter_shapes=[(e, 1)],
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
            adapter_shapes=[(adapters, 1)],
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
    layers = {"num_new_layers": 1, "num_low_rank_layers": 1, "num_frozen_layers": 1}
    estimate = estimate_stage(shape, precision="bf16", **layers, adapter_shapes=[(1, 1)])
    expected = [(component, kind) for component in COMPONENTS for kind in KINDS]
    for kind in ("gradients", "optimizer"):
        expected.remove(("frozen_layers", kind))
    assert [(term.component, term.kind) for term in estimate.terms] == expected


def test_every_term_names_its_formula_with_the_unit_and_tells_its_source() -> None:
    shape = shape_from_hf_config({"model_type": "llama"})
    estimate = estimate_stage(shape, precision="bf16", num_new_layers=1, num_frozen_layers=1, adapter_shapes=[(1, 1)])
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


def adapter_parameters(shape: ModelShape, rank: int, targets: str | list[str]) -> int:
    return sum(prod(factor) for factor in adapter_shapes_per_layer(shape, rank, targets))


def test_lora_of_rank_128_on_a_368m_layer_has_the_known_number_of_parameters() -> None:
    shape = shape_from_hf_config(
        {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2736, "num_attention_heads": 16}
    )
    assert shape.layer_parameters == 12_601_344
    assert adapter_parameters(shape, 128, "all-linear") == 2_492_416
    assert adapter_parameters(shape, 8, ["q_proj", "down_proj"]) == 8 * (1024 + 1024 + 2736 + 1024)


def test_the_rank_is_checked_against_the_chosen_targets_only() -> None:
    shape = shape_from_hf_config(
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    )
    assert adapter_parameters(shape, 64, ["q_proj"]) == 64 * 128
    with pytest.raises(ConfigError, match=r"pet\.rank=17 .* 16, of self_attn\.k_proj \(16 x 64\)"):
        adapter_shapes_per_layer(shape, 17, ["q_proj", "k_proj"])


def test_targets_come_in_the_layers_order_and_fused_maps_are_known() -> None:
    shape = shape_from_hf_config({"model_type": "phi3"})
    assert resolve_target_modules(shape, "all-linear") == ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")
    assert resolve_target_modules(shape, ["down_proj", "o_proj"]) == ("o_proj", "down_proj")


def test_an_unknown_precision_is_refused() -> None:
    shape = shape_from_hf_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"no precision 'fp8'\. Known: bf16, fp32"):
        estimate_stage(shape, precision="fp8", num_new_layers=1)


# --- the options: one layer by hand ---

# P_layer: matrices q 8 x 8, k and v 4 x 8, o 8 x 8, gate and up 12 x 8, down 8 x 12, and two norms of 8.
HAND = shape_from_hf_config(
    {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100,
    }
)  # fmt: skip
MATRICES, VECTORS = 64 + 32 + 32 + 64 + 96 + 96 + 96, 16
EMBEDDINGS = 100 * 8
MOMENTS_8BIT = MATRICES + 7 * 4  # each of the seven is smaller than a block of 256, and has one scale
ALL_OPTIONS = MemoryConfig(
    optimizer_states="8bit", master_weights=False, fused_backward=True, frozen_weights="nf4", offload_frozen=True
)


def by_hand(memory: MemoryConfig | None = None, **options: object) -> MemoryEstimate:
    """Two trained layers on three frozen ones with adapters of rank 2 on the query."""
    counts: dict = {
        "precision": "bf16",
        "num_new_layers": 2,
        "num_frozen_layers": 3,
        "adapter_shapes": ((2, 8), (8, 2)),
    }
    return estimate_stage(HAND, **{**counts, **options}, memory=memory)


def test_an_8_bit_moment_is_a_byte_an_element_and_four_a_block_and_a_vectors_stays_fp32() -> None:
    estimate = by_hand(MemoryConfig(optimizer_states="8bit"))
    assert estimate.bytes_of("new_layers", "optimizer") == 2 * (
        2 * MOMENTS_8BIT + 8 * VECTORS + 4 * (MATRICES + VECTORS)
    )
    assert estimate.bytes_of("adapters", "optimizer") == 3 * 2 * (2 * (16 + 4) + 4 * 16)
    assert estimate.bytes_of("embeddings", "optimizer") == 2 * (EMBEDDINGS + 4 * 4) + 4 * EMBEDDINGS  # 800 / 256: 4
    assert estimate.bytes_of("final_norm", "optimizer") == (8 + 4) * 8


def test_an_fp32_model_has_8_bit_moments_and_no_master_weight() -> None:
    estimate = by_hand(MemoryConfig(optimizer_states="8bit"), precision="fp32")
    assert estimate.bytes_of("new_layers", "optimizer") == 2 * (2 * MOMENTS_8BIT + 8 * VECTORS)


def test_without_master_weights_four_bytes_a_trained_parameter_are_gone() -> None:
    trained = 2 * (MATRICES + VECTORS) + 3 * 32 + 2 * EMBEDDINGS + 8
    without = by_hand(MemoryConfig(master_weights=False))
    assert by_hand().total_bytes - without.total_bytes == 4 * trained
    assert without.bytes_of(kind="optimizer") == 8 * trained


def test_a_fused_update_leaves_no_gradient_and_all_else_as_it_is() -> None:
    fused, plain = by_hand(MemoryConfig(fused_backward=True)), by_hand()
    assert fused.terms == tuple(term for term in plain.terms if term.kind != "gradients")
    assert plain.bytes_of(kind="gradients") == plain.total_bytes - fused.total_bytes > 0


def test_frozen_matrices_are_packed_and_their_vectors_are_not() -> None:
    int8 = MATRICES + 4 * (8 + 4 + 4 + 8 + 12 + 12 + 8)  # a scale for each row
    nf4 = MATRICES // 2 + 2 * (1 + 1 + 1 + 1 + 2 + 2 + 2)  # a scale for each 64 elements
    for frozen_weights, packed in {"full": 2 * MATRICES, "int8": int8, "nf4": nf4}.items():
        estimate = by_hand(MemoryConfig(frozen_weights=frozen_weights))
        assert estimate.bytes_of("frozen_layers") == 3 * (packed + 2 * VECTORS)
        others = [term for term in estimate.terms if term.component != "frozen_layers"]
        assert others == [term for term in by_hand().terms if term.component != "frozen_layers"]
    in_fp32 = by_hand(MemoryConfig(frozen_weights="int8"), precision="fp32")
    assert in_fp32.bytes_of("frozen_layers") == 3 * (int8 + 4 * VECTORS)


@pytest.mark.parametrize(("num_frozen_layers", "slots"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_offloaded_layers_are_in_host_memory_but_for_two(num_frozen_layers: int, slots: int) -> None:
    estimate = by_hand(MemoryConfig(offload_frozen=True), num_frozen_layers=num_frozen_layers)
    assert estimate.bytes_of("frozen_layers", HOST) == num_frozen_layers * 2 * MATRICES
    assert estimate.bytes_of("frozen_layers", "weights") == num_frozen_layers * 2 * VECTORS
    assert estimate.bytes_of("fetched_layers") == slots * 2 * MATRICES
    plain = by_hand(num_frozen_layers=num_frozen_layers)
    # With one or two frozen layers all of them are on the device, and nothing is saved.
    assert plain.total_bytes - estimate.total_bytes == (num_frozen_layers - slots) * 2 * MATRICES
    assert estimate.by_kind()["total"] == estimate.total_bytes == sum(estimate.bytes_of(kind=kind) for kind in KINDS)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_on_embeddings_and_head_leave_the_norm_trained(tied: bool) -> None:
    shape = shape_from_hf_config(
        {
            "model_type": "llama",
            "hidden_size": 8,
            "vocab_size": 100,
            "num_attention_heads": 1,
            "tie_word_embeddings": tied,
        }
    )
    counts = {"precision": "bf16", "num_new_layers": 1, "outer": "adapters", "outer_rank": 3}
    estimate = estimate_stage(shape, **counts)
    matrices = 1 if tied else 2
    assert estimate.bytes_of("embeddings") + estimate.bytes_of("head") == matrices * 2 * 800
    assert estimate.bytes_of("final_norm") == 16 * 8
    assert estimate.bytes_of("adapters") == matrices * 16 * 3 * (100 + 8)
    packed = estimate_stage(shape, **counts, memory=MemoryConfig(optimizer_states="8bit"))
    moments = 2 * (300 + 4 * 2 + 24 + 4)  # two blocks, and one
    assert packed.bytes_of("adapters", "optimizer") == matrices * (moments + 4 * 324)


def test_all_options_together_are_the_sum_of_their_terms() -> None:
    estimate = by_hand(ALL_OPTIONS, outer="adapters", outer_rank=2)
    nf4 = MATRICES // 2 + 2 * 10
    expected = {
        ("new_layers", "weights"): 2 * 2 * (MATRICES + VECTORS),
        ("new_layers", "optimizer"): 2 * (2 * MOMENTS_8BIT + 8 * VECTORS),
        ("frozen_layers", "weights"): 3 * 2 * VECTORS,
        ("frozen_layers", HOST): 3 * nf4,
        ("fetched_layers", "weights"): 2 * nf4,
        ("adapters", "weights"): 2 * (3 * 32 + 2 * 216),
        ("adapters", "optimizer"): 2 * (3 * 2 * (16 + 4) + 2 * (200 + 4 + 16 + 4)),
        ("embeddings", "weights"): 2 * EMBEDDINGS,
        ("final_norm", "weights"): 2 * 8,
        ("final_norm", "optimizer"): 8 * 8,
        ("head", "weights"): 2 * EMBEDDINGS,
    }
    found = {key: estimate.bytes_of(*key) for key in {(term.component, term.kind) for term in estimate.terms}}
    assert found == expected


def test_the_default_options_are_the_formula_of_the_source() -> None:
    assert by_hand(MemoryConfig()) == by_hand()
    p, e = MATRICES + VECTORS, 32
    assert by_hand(MemoryConfig(), count_outer=False).total_bytes == 16 * 2 * p + 2 * 3 * p + 16 * 3 * e


@given(
    shape=shapes(), **LAYERS, e=st.integers(0, 10**6), precision=st.sampled_from(list(WEIGHT_BYTES)),
    eight_bit=st.booleans(),
)  # fmt: skip
def test_no_option_adds_to_the_model_state(
    shape: ModelShape, num_new_layers: int, num_frozen_layers: int, e: int, precision: str, eight_bit: bool
) -> None:
    """But for a scale of four bytes on a matrix of a few elements: a moment of fewer than two has more in 8 bits."""

    def total(**options: object) -> int:
        estimate = estimate_stage(
            shape,
            precision=precision,
            num_new_layers=num_new_layers,
            num_frozen_layers=num_frozen_layers,
            adapter_shapes=[(e, 1)],
            memory=MemoryConfig(**{"optimizer_states": "8bit" if eight_bit else "fp32", **options}),
        )
        assert all(term.num_bytes > 0 for term in estimate.terms)
        return estimate.total_bytes

    base = total()
    assert total(master_weights=False) <= base
    assert total(fused_backward=True) < base
    assert total(offload_frozen=True) <= base
    if min(shape.layer_matrices) >= 2 and shape.embedding_parameters >= 2 and e != 1:
        assert total(optimizer_states="8bit") <= total(optimizer_states="fp32")
    if min(linear.in_features for linear in shape.linears) >= 4:  # a row's scale is four bytes
        assert total(frozen_weights="int8") <= base
    if min(shape.layer_matrices) >= 2:
        assert total(frozen_weights="nf4") <= base
