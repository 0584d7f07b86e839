"""Planned bytes: the formula, term by term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from steplm.config import RunConfig, load_config
from steplm.cost.rules import RULES, row_blocks
from steplm.cost.terms import (
    COMPONENTS,
    KINDS,
    OUTER_COMPONENTS,
    WEIGHT_BYTES,
    adapter_shapes,
    model_state,
    resolve_target_modules,
)
from steplm.errors import ConfigError
from steplm.planner.shape import FAMILIES, shape_from_hf_config
from steplm.schedule import Adapter, Frozen, Phase, Role, Trained
from steplm.types import HOST, MemoryEstimate, ModelShape

MakePhase = Callable[..., Phase]
ByHand = Callable[..., MemoryEstimate]
LAYERS = {"num_new": st.integers(1, 50), "num_old": st.integers(0, 50)}


def configured(precision: str = "bf16", optim: dict[str, Any] | None = None, **memory: Any) -> RunConfig:
    return load_config({"train": {"precision": precision}, "optim": optim or {}, "memory": memory})


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


@st.composite
def old_roles(draw: st.DrawFn, shape: ModelShape) -> Adapter | Frozen:
    """Of a layer that is not trained."""
    targets = draw(st.lists(st.sampled_from(resolve_target_modules(shape, "all-linear")), unique=True))
    largest = min(min(linear.in_features, linear.out_features) for linear in shape.linears)
    return Adapter(draw(st.integers(1, largest)), 4.0, tuple(targets)) if targets else Frozen()


def adapter_parameters(shape: ModelShape, role: Role) -> int:
    """E, by hand."""
    if not isinstance(role, Adapter):
        return 0
    adapted = (linear for linear in shape.linears if linear.name.rpartition(".")[2] in role.target_modules)
    return sum(role.rank * (linear.in_features + linear.out_features) for linear in adapted)


@given(shape=shapes(), **LAYERS, data=st.data())
def test_bf16_takes_sixteen_bytes_trained_and_two_frozen(
    make_phase: MakePhase, shape: ModelShape, num_new: int, num_old: int, data: st.DataObject
) -> None:
    old = data.draw(old_roles(shape))
    phase, config = make_phase({Trained(): num_new, old: num_old}), configured()
    p, outer, e = shape.layer_parameters, shape.outer_parameters, adapter_parameters(shape, old)
    bare = 16 * num_new * p + 2 * num_old * p + 16 * num_old * e
    assert model_state(config, shape, phase, count_outer=False).total_bytes == bare
    assert model_state(config, shape, phase).total_bytes == bare + 16 * outer
    frozen = replace(phase, embeddings_and_head=Frozen())
    assert model_state(config, shape, frozen).total_bytes == bare + 2 * outer


@given(shape=shapes(), **LAYERS, data=st.data())
def test_fp32_takes_sixteen_bytes_trained_and_four_frozen(
    make_phase: MakePhase, shape: ModelShape, num_new: int, num_old: int, data: st.DataObject
) -> None:
    old = data.draw(old_roles(shape))
    estimate = model_state(configured("fp32"), shape, make_phase({Trained(): num_new, old: num_old}))
    p, outer = shape.layer_parameters, shape.outer_parameters
    trained = num_new * p + num_old * adapter_parameters(shape, old) + outer
    assert estimate.total_bytes == 16 * trained + 4 * num_old * p
    assert estimate.bytes_of(kind="optimizer") == 2 * estimate.bytes_of(kind="gradients") == 8 * trained


@given(shape=shapes(), **LAYERS, data=st.data(), precision=st.sampled_from(list(WEIGHT_BYTES)))
def test_bytes_grow_with_every_count_and_no_term_is_negative(
    make_phase: MakePhase, shape: ModelShape, num_new: int, num_old: int, data: st.DataObject, precision: str
) -> None:
    def total(new: int, old: int, role: Role) -> int:
        estimate = model_state(configured(precision), shape, make_phase({Trained(): new, role: old}))
        assert all(term.num_bytes > 0 for term in estimate.terms)
        assert estimate.total_bytes == sum(estimate.bytes_of(kind=kind) for kind in KINDS)
        return estimate.total_bytes

    old = data.draw(old_roles(shape))
    here = total(num_new, num_old, old)
    assert total(num_new + 1, num_old, old) > here
    assert total(num_new, num_old + 1, old) > here
    if isinstance(old, Adapter) and old.rank > 1:
        lower = replace(old, rank=old.rank - 1)
        assert total(num_new, num_old + 1, lower) < total(num_new, num_old + 1, old)


LLAMA = shape_from_hf_config({"model_type": "llama"})
ON_QUERIES = Adapter(1, 1.0, ("q_proj",))


def test_every_term_appears_where_everything_is_there(make_phase: MakePhase) -> None:
    estimate = model_state(configured(), LLAMA, make_phase([Trained(), ON_QUERIES]))
    on_device = [kind for kind in KINDS if not kind.startswith("host_")]
    assert set(on_device) == {"weights", "gradients", "optimizer"}
    expected = [(component, kind) for component in COMPONENTS for kind in on_device]
    for kind in ("gradients", "optimizer"):
        expected.remove(("frozen_layers", kind))
    assert [(term.component, term.kind) for term in estimate.terms] == expected


def test_every_term_names_its_formula_with_the_unit_and_tells_its_source(make_phase: MakePhase) -> None:
    estimate = model_state(configured(), LLAMA, make_phase([Trained(), ON_QUERIES]))
    for term in estimate.terms:
        assert term.formula.endswith(f"× {term.num_bytes // term.num_parameters} B")
    assert all(groups.__doc__ for groups in COMPONENTS.values())
    assert all(kind.__doc__ for kind in KINDS.values())
    assert all(rule.source for rule in RULES.values())


def test_a_tied_head_is_counted_once(make_phase: MakePhase) -> None:
    tied = shape_from_hf_config({"model_type": "llama", "tie_word_embeddings": True})
    sizes = [model_state(configured(), shape, make_phase([Trained()])) for shape in (tied, LLAMA)]
    assert sizes[0].bytes_of("head") == 0
    assert sizes[1].total_bytes - sizes[0].total_bytes == 16 * 32000 * 4096


def test_outer_components_can_be_left_out(make_phase: MakePhase) -> None:
    estimate = model_state(configured(), LLAMA, make_phase([Trained()] * 2), count_outer=False)
    assert not {term.component for term in estimate.terms} & set(OUTER_COMPONENTS)


def factor_parameters(shape: ModelShape, rank: int, targets: str | list[str]) -> int:
    adapter = Adapter(rank, 1.0, resolve_target_modules(shape, targets))
    return sum(map(prod, adapter_shapes(shape, adapter)))


def test_lora_of_rank_128_on_a_368m_layer_has_the_known_number_of_parameters() -> None:
    shape = shape_from_hf_config(
        {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2736, "num_attention_heads": 16}
    )
    assert shape.layer_parameters == 12_601_344
    assert factor_parameters(shape, 128, "all-linear") == 2_492_416
    assert factor_parameters(shape, 8, ["q_proj", "down_proj"]) == 8 * (1024 + 1024 + 2736 + 1024)


def test_the_rank_is_checked_against_the_chosen_targets_only() -> None:
    shape = shape_from_hf_config(
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    )
    assert factor_parameters(shape, 64, ["q_proj"]) == 64 * 128
    with pytest.raises(ConfigError, match=r"pet\.rank=17 .* 16, of self_attn\.k_proj \(16 x 64\)"):
        factor_parameters(shape, 17, ["q_proj", "k_proj"])


def test_targets_come_in_the_layers_order_and_fused_maps_are_known() -> None:
    shape = shape_from_hf_config({"model_type": "phi3"})
    assert resolve_target_modules(shape, "all-linear") == ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")
    assert resolve_target_modules(shape, ["down_proj", "o_proj"]) == ("o_proj", "down_proj")


def test_the_fused_maps_of_phi3_are_blocks_of_rows_and_a_shape_of_two_matrices_is_never_split() -> None:
    values = {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape = shape_from_hf_config({**values, "intermediate_size": 100})
    assert row_blocks(shape) == {(96, 64): (64, 16, 16), (200, 64): (100, 100)}
    assert row_blocks(shape_from_hf_config({**values, "intermediate_size": 48})) == {}  # both are 96 x 64
    assert row_blocks(replace(shape, model_type="llama")) == {}


def test_a_layer_of_phi3_is_one_of_llama_with_its_blocks_as_separate_maps() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20}
    blocks = row_blocks(shape_from_hf_config({"model_type": "phi3", **sizes}))
    fused = Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=8, num_hidden_layers=1, pad_token_id=0))
    separate = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8, num_hidden_layers=1, rms_norm_eps=1e-5))
    weights = fused.state_dict()
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    qkv, gate_up = weights.pop(attention + "qkv_proj.weight"), weights.pop(mlp + "gate_up_proj.weight")
    for name, part in zip("qkv", qkv.split(blocks[32, 16]), strict=True):
        weights[f"{attention}{name}_proj.weight"] = part
    for name, part in zip(("gate", "up"), gate_up.split(blocks[40, 16]), strict=True):
        weights[f"{mlp}{name}_proj.weight"] = part
    separate.load_state_dict(weights)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(fused(tokens).logits, separate(tokens).logits)


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
ALL_OPTIONS = {
    "optimizer_states": "8bit", "master_weights": False, "fused_backward": True, "frozen_weights": "nf4",
    "offload_frozen": True,
}  # fmt: skip
# Two trained layers on three frozen ones with adapters of rank 2 on the query.
ADAPTED = Adapter(2, 8.0, ("q_proj",))


@pytest.fixture
def by_hand(make_phase: MakePhase) -> ByHand:
    """``by_hand(num_old, outside, precision, count_outer, **memory)``: the model state of these five layers."""

    def estimate(
        num_old: int = 3, outside: Role | None = None, precision: str = "bf16", count_outer: bool = True, **memory: Any
    ) -> MemoryEstimate:
        config = configured(precision, {"max_grad_norm": None}, **memory)
        phase = make_phase({Trained(): 2, ADAPTED: num_old}, outside)
        return model_state(config, HAND, phase, count_outer=count_outer)

    return estimate


def test_an_8_bit_moment_is_a_byte_an_element_and_four_a_block_and_a_vectors_stays_fp32(by_hand: ByHand) -> None:
    estimate = by_hand(optimizer_states="8bit")
    assert estimate.bytes_of("trained_layers", "optimizer") == 2 * (
        2 * MOMENTS_8BIT + 8 * VECTORS + 4 * (MATRICES + VECTORS)
    )
    assert estimate.bytes_of("adapters", "optimizer") == 3 * 2 * (2 * (16 + 4) + 4 * 16)
    assert estimate.bytes_of("embeddings", "optimizer") == 2 * (EMBEDDINGS + 4 * 4) + 4 * EMBEDDINGS  # 800 / 256: 4
    assert estimate.bytes_of("final_norm", "optimizer") == (8 + 4) * 8


def test_an_fp32_model_has_8_bit_moments_and_no_master_weight(by_hand: ByHand) -> None:
    estimate = by_hand(optimizer_states="8bit", precision="fp32")
    assert estimate.bytes_of("trained_layers", "optimizer") == 2 * (2 * MOMENTS_8BIT + 8 * VECTORS)


def test_without_master_weights_four_bytes_a_trained_parameter_are_gone(by_hand: ByHand) -> None:
    trained = 2 * (MATRICES + VECTORS) + 3 * 32 + 2 * EMBEDDINGS + 8
    without = by_hand(master_weights=False)
    assert by_hand().total_bytes - without.total_bytes == 4 * trained
    assert without.bytes_of(kind="optimizer") == 8 * trained


def test_a_fused_update_leaves_no_gradient_and_all_else_as_it_is(by_hand: ByHand) -> None:
    fused, plain = by_hand(fused_backward=True), by_hand()
    assert fused.terms == tuple(term for term in plain.terms if term.kind != "gradients")
    assert plain.bytes_of(kind="gradients") == plain.total_bytes - fused.total_bytes > 0


def test_frozen_matrices_are_packed_and_their_vectors_are_not(by_hand: ByHand) -> None:
    int8 = MATRICES + 4 * (8 + 4 + 4 + 8 + 12 + 12 + 8)  # a scale for each row
    nf4 = MATRICES // 2 + 2 * (1 + 1 + 1 + 1 + 2 + 2 + 2)  # a scale for each 64 elements
    for frozen_weights, packed in {"full": 2 * MATRICES, "int8": int8, "nf4": nf4}.items():
        estimate = by_hand(frozen_weights=frozen_weights)
        assert estimate.bytes_of("frozen_layers") == 3 * (packed + 2 * VECTORS)
        others = [term for term in estimate.terms if term.component != "frozen_layers"]
        assert others == [term for term in by_hand().terms if term.component != "frozen_layers"]
    in_fp32 = by_hand(frozen_weights="int8", precision="fp32")
    assert in_fp32.bytes_of("frozen_layers") == 3 * (int8 + 4 * VECTORS)


@pytest.mark.parametrize(("num_old", "slots"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_offloaded_layers_are_in_host_memory_but_for_two(by_hand: ByHand, num_old: int, slots: int) -> None:
    estimate = by_hand(offload_frozen=True, num_old=num_old)
    assert estimate.bytes_of("frozen_layers", HOST) == num_old * 2 * MATRICES
    assert estimate.bytes_of("frozen_layers", "weights") == num_old * 2 * VECTORS
    assert estimate.bytes_of("fetched_layers") == slots * 2 * MATRICES
    plain = by_hand(num_old=num_old)
    # With one or two frozen layers all of them are on the device, and nothing is saved.
    assert plain.total_bytes - estimate.total_bytes == (num_old - slots) * 2 * MATRICES
    assert estimate.by_kind()["total"] == estimate.total_bytes == sum(estimate.bytes_of(kind=kind) for kind in KINDS)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_on_embeddings_and_head_leave_the_norm_trained(make_phase: MakePhase, tied: bool) -> None:
    shape = shape_from_hf_config(
        {
            "model_type": "llama",
            "hidden_size": 8,
            "vocab_size": 100,
            "num_attention_heads": 1,
            "tie_word_embeddings": tied,
        }
    )
    phase = make_phase([Trained()], Adapter(3, 12.0, ()))
    estimate = model_state(configured(), shape, phase)
    matrices = 1 if tied else 2
    assert estimate.bytes_of("embeddings") + estimate.bytes_of("head") == matrices * 2 * 800
    assert estimate.bytes_of("final_norm") == 16 * 8
    assert estimate.bytes_of("adapters") == matrices * 16 * 3 * (100 + 8)
    packed = model_state(configured(optimizer_states="8bit"), shape, phase)
    moments = 2 * (300 + 4 * 2 + 24 + 4)  # two blocks, and one
    assert packed.bytes_of("adapters", "optimizer") == matrices * (moments + 4 * 324)


def test_all_options_together_are_the_sum_of_their_terms(by_hand: ByHand) -> None:
    estimate = by_hand(outside=Adapter(2, 8.0, ()), **ALL_OPTIONS)
    nf4 = MATRICES // 2 + 2 * 10
    expected = {
        ("trained_layers", "weights"): 2 * 2 * (MATRICES + VECTORS),
        ("trained_layers", "optimizer"): 2 * (2 * MOMENTS_8BIT + 8 * VECTORS),
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


def test_the_default_options_are_the_formula_of_the_source(by_hand: ByHand) -> None:
    p, e = MATRICES + VECTORS, 32
    assert by_hand(count_outer=False).total_bytes == 16 * 2 * p + 2 * 3 * p + 16 * 3 * e


@given(shape=shapes(), **LAYERS, data=st.data(), precision=st.sampled_from(list(WEIGHT_BYTES)), eight_bit=st.booleans())
def test_no_option_adds_to_the_model_state(
    make_phase: MakePhase,
    shape: ModelShape,
    num_new: int,
    num_old: int,
    data: st.DataObject,
    precision: str,
    eight_bit: bool,
) -> None:
    """But for a scale of four bytes on a matrix of a few elements: a moment of fewer than two has more in 8 bits."""
    old = data.draw(old_roles(shape))
    phase = make_phase({Trained(): num_new, old: num_old})

    def total(**options: object) -> int:
        memory = {"optimizer_states": "8bit" if eight_bit else "fp32", **options}
        config = configured(precision, {"max_grad_norm": None}, **memory)
        estimate = model_state(config, shape, phase)
        assert all(term.num_bytes > 0 for term in estimate.terms)
        return estimate.total_bytes

    base = total()
    assert total(master_weights=False) <= total(master_weights="8bit") <= base
    assert total(fused_backward=True) < base
    assert total(offload_frozen=True) <= base
    factors = adapter_shapes(shape, old) if isinstance(old, Adapter) else ()
    if min((*shape.layer_matrices, *map(prod, factors), shape.embedding_parameters)) >= 2:
        assert total(optimizer_states="8bit") <= total(optimizer_states="fp32")
    if min(linear.in_features for linear in shape.linears) >= 4:  # a row's scale is four bytes
        assert total(frozen_weights="int8") <= base
    if min(shape.layer_matrices) >= 2:
        assert total(frozen_weights="nf4") <= base


# --- mixtures ---


def test_adapters_of_different_ranks_are_each_counted(make_phase: MakePhase) -> None:
    """``rank (in + out)`` of each: 16 bytes a parameter, as if they were alone."""
    ranks = (1, 3, 3, 2)
    on_down = Adapter(4, 8.0, ("down_proj",))
    roles = (Trained(), *(Adapter(rank, 8.0, ("q_proj", "v_proj")) for rank in ranks), Frozen(), on_down)
    estimate = model_state(configured(), HAND, make_phase(roles))
    e = sum(rank * (8 + 8 + 8 + 4) for rank in ranks) + 4 * (12 + 8)
    assert estimate.bytes_of("adapters") == 16 * e
    assert sum(term.num_parameters for term in estimate.terms if term.component == "adapters") == 3 * e
    assert estimate.bytes_of("frozen_layers") == 6 * 2 * (MATRICES + VECTORS)
    assert estimate.bytes_of("trained_layers") == 16 * (MATRICES + VECTORS)
    upside_down = model_state(configured(), HAND, make_phase(reversed(roles)))
    assert upside_down.by_kind() == estimate.by_kind(), "where they are changes nothing"


def test_layers_under_different_rules_are_each_counted_and_only_the_named_rule_keeps_its_master(
    make_phase: MakePhase,
) -> None:
    config = configured(optim={"rank": 2}, master_weights="adamw")
    phase = make_phase({Trained(): 2, Trained("apollo_mini"): 3})
    estimate = model_state(config, HAND, phase, count_outer=False)
    p = MATRICES + VECTORS
    low_rank = sum(2 * 4 * larger_side + 4 for larger_side in (8, 8, 8, 8, 12, 12, 12))
    assert estimate.bytes_of("trained_layers", "weights") == estimate.bytes_of(kind="gradients") == 5 * 2 * p
    assert [term.num_bytes for term in estimate.terms if term.kind == "optimizer"] == [
        2 * 12 * p, 3 * (low_rank + 12 * VECTORS)
    ]  # fmt: skip
