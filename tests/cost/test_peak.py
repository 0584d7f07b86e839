"""The whole peak: what it is made of, what raises it, and what each option does to it at most.

No option can lower every peak: some give up a little workspace for what they save. So each has a bound, an
inequality that holds for every model and plan, and a corollary: from which size on the option never raises the peak.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steplm.config import RunConfig, load_config
from steplm.cost.activations import MODELED, Workload
from steplm.cost.formats import (
    CODE_BOOK_BYTES,
    STEP_CHUNK,
    largest_bucket,
    step_bytes,
    unpack_bytes,
)
from steplm.errors import ConfigError
from steplm.planner.plan import plan
from steplm.planner.shape import FAMILIES, shape_from_hf_config
from steplm.planner.solve import SOLVERS, peak_cost, solve_exhaustive
from steplm.planner.stages import StagePrices
from steplm.types import HOST, PeakEstimate, to_json

QUICK = settings(max_examples=40, deadline=None)
FUSED = {"memory.fused_backward": True, "optim.max_grad_norm": None, "train.gradient_accumulation_steps": 1}


@st.composite
def values(draw: st.DrawFn, max_layers: int = 6) -> dict[str, Any]:
    """``section.key`` -> value of any run whose peak is modeled; the memory options are as they are drawn."""
    heads = draw(st.sampled_from([2, 4]))
    hidden = heads * draw(st.sampled_from([4, 16, 64]))
    num_layers = draw(st.integers(1, max_layers))
    num_stages = draw(st.integers(1, min(3, num_layers)))
    accumulates = draw(st.booleans())
    bf16 = draw(st.booleans())
    fused = draw(st.booleans()) and not accumulates
    return {
        "model.model_type": draw(st.sampled_from(list(MODELED))),
        "model.hidden_size": hidden,
        "model.intermediate_size": draw(st.integers(hidden, 4 * hidden)),
        "model.num_attention_heads": heads,
        "model.num_key_value_heads": draw(st.sampled_from([1, heads])),
        "model.num_hidden_layers": num_layers,
        "model.vocab_size": draw(st.integers(2, 3000)),
        "model.tie_word_embeddings": draw(st.booleans()),
        "model.extra": {"head_dim": hidden // heads},
        "plan.num_stages": num_stages,
        "plan.train_embeddings": draw(st.sampled_from(["always", "first_stage"])),
        "plan.total_tokens": 10**9,
        "growth.position": draw(st.sampled_from(["upper", "intermediate", "lower", "even"])),
        "pet.method": draw(st.sampled_from(["lora", "none"])),
        "pet.rank": draw(st.integers(1, 4)),
        "pet.target_modules": draw(st.sampled_from(["all-linear", ["q_proj", "down_proj"]])),
        "train.precision": "bf16" if bf16 else "fp32",
        "train.sequence_length": draw(st.sampled_from([8, 64, 512])),
        "train.per_device_train_batch_size": draw(st.integers(1, 8)),
        "train.gradient_accumulation_steps": 2 if accumulates else 1,
        "train.gradient_checkpointing": draw(st.sampled_from([False, True, "frozen", "new"])),
        "train.loss_chunk_size": draw(st.sampled_from([1, 32, 512])),
        "optim.max_grad_norm": None,
        "data.within_documents": draw(st.booleans()),
        "memory.optimizer_states": draw(st.sampled_from(["fp32", "8bit"])),
        "memory.master_weights": draw(st.sampled_from([True, False, "8bit"])) if bf16 else True,
        "memory.fused_backward": fused,
        "memory.frozen_weights": draw(st.sampled_from(["full", "int8", "nf4"])),
        "memory.offload_frozen": draw(st.booleans()),
        "memory.offload_activations": draw(st.booleans()),
    }


def configure(drawn: dict[str, Any], **changes: Any) -> RunConfig:
    """``changes`` are spelled ``section__key``."""
    sections: dict[str, Any] = {}
    for key, value in {**drawn, **{key.replace("__", "."): value for key, value in changes.items()}}.items():
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[name] = value
    return load_config(sections)


def peaks(config: RunConfig) -> list[PeakEstimate]:
    return [stage.peak for stage in plan(config).stages if stage.peak is not None]


def peak_bytes(config: RunConfig) -> int:
    peak = plan(config).peak_bytes
    assert peak is not None
    return peak


# --- what it is made of ---


@QUICK
@given(drawn=values())
def test_a_peak_is_the_largest_instant_and_an_instant_the_sum_of_its_terms(drawn: dict[str, Any]) -> None:
    made = plan(configure(drawn))
    assert made.peak_bytes == max(stage.device_bytes for stage in made.stages)
    for stage in made.stages:
        assert stage.peak is not None
        totals = []
        for instant in stage.peak.instants:
            terms = instant.memory.terms
            assert all(type(term.num_bytes) is int and term.num_bytes > 0 for term in terms), instant.name
            totals.append(sum(term.num_bytes for term in terms if term.kind != HOST))
            assert instant.memory.total_bytes == totals[-1]
        assert stage.peak.total_bytes == stage.device_bytes == max(totals)
        assert stage.peak.highest_in_a_pass.memory.total_bytes <= stage.device_bytes
        names = [instant.name for instant in stage.peak.instants]
        assert len(set(names)) == len(names)


@QUICK
@given(drawn=values())
def test_no_instant_of_training_has_less_than_weights_and_states(drawn: dict[str, Any]) -> None:
    for stage in plan(configure(drawn, plan__count_embeddings=True)).stages:
        assert stage.peak is not None
        at_rest = stage.memory.total_bytes - stage.memory.bytes_of(kind="gradients")
        for instant in stage.peak.instants:
            if instant.name != "growth":  # before it the optimizer does not exist
                assert instant.memory.total_bytes >= at_rest
        step = next(instant.memory for instant in stage.peak.instants if instant.name == "optimizer step")
        assert step.total_bytes >= stage.memory.total_bytes, "all gradients are there at the update"


def test_every_instant_of_one_layer_by_hand() -> None:
    """One llama layer, d = 8, f = 16, two heads of four, V = 10, in 2 x 4 tokens, bf16."""
    config = load_config(
        {
            "model": {
                "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "vocab_size": 10,
            },
            "plan": {"num_stages": 1, "total_tokens": 1000},
            "train": {"sequence_length": 4, "per_device_train_batch_size": 2, "loss_chunk_size": 3},
        }
    )  # fmt: skip
    (stage,) = plan(config).stages
    assert stage.peak is not None
    found = {instant.name: instant.memory.total_bytes for instant in stage.peak.instants}
    N, d, f, V = 8, 8, 16, 10
    matrices = 4 * d * d + 3 * d * f
    layer, outer = matrices + 2 * d, 2 * V * d + d
    at_rest = 14 * (layer + outer)
    # Tokens and labels; cosines and sines of four positions and four dimensions; frequencies and the loss.
    batch = 16 * N + 2 * 2 * 4 * 4 + 4 * (4 + 2)
    norm = 6 * N * d + 4 * N
    attention = 2 * 4 * N * d + 4 * N * 2  # query, key, value, output; its normaliser
    saved = 2 * norm + attention + 2 * 2 * N * d + 4 * 2 * N * f
    head = 2 * V * d
    chunk = max(6 * 3 * V, 2 * 3 * V + 2 * V * d)
    assert found["loss"] == at_rest + batch + saved + norm + 2 * 2 * N * d + chunk + 4 * V * d
    assert found["backward of the final norm"] == at_rest + batch + saved + norm + 18 * N * d + head
    in_layer = 2 * N * d + 2 * 2 * N * f + 2 * f * d
    assert found["backward of layer 0"] == at_rest + batch + saved + in_layer + head
    assert found["backward of the embeddings"] == at_rest + batch + 2 * (layer + outer) + 2 * N * d
    assert found["optimizer step"] == at_rest + 2 * (layer + outer) + 4 * (matrices + 2 * V * d)


def instants(config: RunConfig) -> list[dict[str, int]]:
    return [{instant.name: instant.memory.total_bytes for instant in peak.instants} for peak in peaks(config)]


@QUICK
@given(drawn=values())
def test_summed_gradients_wait_through_the_next_micro_batch(drawn: dict[str, Any]) -> None:
    drawn = {**drawn, "memory.fused_backward": False}
    layers = list(plan(configure(drawn)).layers)
    once, often = (configure(drawn, plan__layers=layers, train__gradient_accumulation_steps=n) for n in (1, 2))
    for stage, one, two in zip(
        plan(configure(drawn, plan__layers=layers, plan__count_embeddings=True)).stages,
        instants(once),
        instants(often),
        strict=True,
    ):
        gradients = stage.memory.bytes_of(kind="gradients")
        assert two["loss"] - one["loss"] == gradients
        assert (two["optimizer step"], two["evaluation"]) == (one["optimizer step"], one["evaluation"])


@QUICK
@given(drawn=values())
def test_the_tables_of_8_bit_states_are_there_all_the_time(drawn: dict[str, Any]) -> None:
    """Also between two steps, at an evaluation; before an optimizer exists, at the growth, they are not."""
    drawn = {**drawn, "memory.fused_backward": False}
    layers = list(plan(configure(drawn)).layers)
    fp32, in_8_bits = (
        plan(configure(drawn, plan__layers=layers, memory__optimizer_states=states)).stages
        for states in ("fp32", "8bit")
    )
    for one, other in zip(fp32, in_8_bits, strict=True):
        assert one.peak is not None
        assert other.peak is not None
        saved = one.memory.bytes_of(kind="optimizer") - other.memory.bytes_of(kind="optimizer")
        for before, after in zip(one.peak.instants, other.peak.instants, strict=True):
            if before.name not in ("growth", "optimizer step"):
                assert after.memory.total_bytes == before.memory.total_bytes - saved + CODE_BOOK_BYTES, before.name


def test_the_peak_is_none_where_the_layers_are_not_modeled_and_no_budget_is_promised() -> None:
    not_modeled = sorted(set(FAMILIES) - set(MODELED))
    assert "phi3" in not_modeled
    for model_type in not_modeled:
        model = {
            "model_type": model_type,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
        }
        base = {"model": model, "pet": {"rank": 2}, "memory": {"reserve": 1000}}  # fmt: skip
        made = plan(load_config(base))
        assert [stage.peak for stage in made.stages] == [None, None]
        assert (made.peak_bytes, made.vanilla_peak_bytes) == (None, None)
        assert {stage.device_bytes for stage in made.stages} == {stage.memory.total_bytes for stage in made.stages}
        with pytest.raises(ConfigError, match=f"activations of model type '{model_type}' are not known .* --simulate"):
            plan(load_config(base, ["plan.budget=1TiB"]))


@QUICK
@given(drawn=values())
def test_ordinary_training_is_the_vanilla_of_every_plan(drawn: dict[str, Any]) -> None:
    plain = {key: value for key, value in drawn.items() if not key.startswith("memory.")}
    one_stage = configure(plain, plan__num_stages=1, train__gradient_checkpointing=False)
    assert plan(configure(drawn)).vanilla_peak_bytes == peak_bytes(one_stage)


# --- what raises it ---


@QUICK
@given(
    drawn=values(),
    change=st.sampled_from(
        [
            ("train.per_device_train_batch_size", lambda size: size + 1),
            ("train.sequence_length", lambda length: 2 * length),
            ("train.sequence_length", lambda length: length + 1),
            ("train.loss_chunk_size", lambda size: size + 7),
            ("model.vocab_size", lambda size: size + 1),
            ("model.vocab_size", lambda size: 3 * size),
            ("model.intermediate_size", lambda size: size + 8),
        ]
    ),
)
def test_more_work_at_once_and_a_larger_model_never_lower_a_stages_peak(drawn: dict[str, Any], change: Any) -> None:
    """Of models whose trained matrices the optimizer updates in one group; see the next test."""
    key, raised = change
    layers = plan(configure(drawn)).layers  # the same stages in both
    before = configure({**drawn, "plan.layers": list(layers)})
    after = configure({**drawn, "plan.layers": list(layers), key: raised(drawn[key])})
    for config in (before, after):
        assume(plan(config).shape.num_parameters() < STEP_CHUNK)
    for low, high in zip(peaks(before), peaks(after), strict=True):
        assert low.total_bytes <= high.total_bytes
        for one, other in zip(low.instants, high.instants, strict=True):
            if not one.name.startswith("backward of layer"):
                assert one.memory.total_bytes <= other.memory.total_bytes, one.name


def test_groups_of_matrices_may_fit_worse_into_the_optimizers_chunk_in_a_larger_model() -> None:
    """The one way in which a larger model needs less: its step has less workspace, by at most a chunk's."""
    fits, spills = [3 * 2**20, 2**20], [3 * 2**20 + 1, 2**20]
    assert sum(fits) == STEP_CHUNK
    assert largest_bucket(fits) == STEP_CHUNK > largest_bucket(spills)


@QUICK
@given(drawn=values(), seed=st.integers(0, 5))
def test_one_more_layer_of_either_kind_never_lowers_a_stages_peak(drawn: dict[str, Any], seed: int) -> None:
    config = configure(drawn, plan__num_stages=2, model__num_hidden_layers=8)
    costs = StagePrices(config, shape_from_hf_config(config.model.hf_config()))
    assume(costs.shape.num_parameters(8) < STEP_CHUNK)
    num_new, num_old = 1 + seed, 2 + seed % 3

    def total(new: int, old: int) -> int:
        (draft,) = costs.drafts(new, old)
        peak = costs.cost_of_draft(draft).peak
        assert peak is not None
        return peak.total_bytes

    here = total(num_new, num_old)
    assert total(num_new + 1, num_old) >= here, "one more new layer"
    assert total(num_new, 0) <= total(num_new + 1, 0), "in stage 1"
    if drawn["growth.position"] == "lower":
        # The new layers stay where they are, and the frozen one comes on top.
        assert total(num_new, num_old + 1) >= here


# --- what lowers it ---


def num_tokens(config: RunConfig) -> int:
    return config.train.per_device_train_batch_size * config.train.sequence_length


def largest_trained_matrix(config: RunConfig) -> int:
    shape = plan(config).shape
    return max(*shape.layer_matrices, shape.vocab_size * shape.hidden_size)


def bucket_elements(config: RunConfig) -> int:
    """The most that a step of the optimizer can have at once, of any stage: a chunk, or all there is."""
    shape = plan(config).shape
    adapters = sum(4 * (linear.in_features + linear.out_features) for linear in shape.linears)
    return min(STEP_CHUNK, shape.num_parameters() + shape.num_hidden_layers * adapters)


def masters(config: RunConfig) -> str:
    """What is held beside a weight."""
    return {True: "fp32", False: "none", "8bit": "8bit"}[config.memory.master_weights]


def by_stage(drawn: dict[str, Any], option: dict[str, Any], without: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Peak with the option, peak without it, and what the option takes from weights and states, of each stage."""
    layers = list(plan(configure({**drawn, **without})).layers)
    one, other = (
        plan(configure({**drawn, **extra, "plan.layers": layers, "plan.count_embeddings": True}))
        for extra in (option, without)
    )

    def lasting(stage: Any) -> int:
        return stage.memory.total_bytes - stage.memory.bytes_of(kind="gradients")

    return [
        (a.device_bytes, b.device_bytes, lasting(b) - lasting(a)) for a, b in zip(one.stages, other.stages, strict=True)
    ]


@QUICK
@given(drawn=values())
def test_8_bit_states_cost_at_most_their_tables_and_a_larger_step(drawn: dict[str, Any]) -> None:
    """17 bytes an element of the step instead of 4, or of 8, and the tables: no more than 55 MB.

    From 9.3M trained parameters on a plan's peak never rises: what is saved is more than that.
    """
    key = "memory.optimizer_states"
    config = configure(drawn)
    larger = 17 - step_bytes(100, 1, states="fp32", masters=masters(config)) // 100
    for with_option, without, saved in by_stage(drawn, {key: "8bit"}, {key: "fp32"}):
        assert with_option <= without - saved + CODE_BOOK_BYTES + larger * bucket_elements(config)
    most = CODE_BOOK_BYTES + (17 - 4) * STEP_CHUNK
    assert most < 55.2e6 < 9.3e6 * (8 - 2 * (1 + 4 / 256))


@QUICK
@given(drawn=values())
def test_no_master_weights_cost_at_most_a_larger_step(drawn: dict[str, Any]) -> None:
    """9 bytes an element of the step instead of 4; with 8-bit states four more at most, which is what is saved.

    So with 8-bit states the peak never rises, and with fp32 states it does not from 5.3M trained parameters on.
    """
    drawn, key = {**drawn, "train.precision": "bf16"}, "memory.master_weights"
    for with_option, without, saved in by_stage(drawn, {key: False}, {key: True}):
        assert saved > 0
        if drawn["memory.optimizer_states"] == "8bit":
            assert with_option <= without
        else:
            assert with_option <= without - saved + (9 - 4) * bucket_elements(configure(drawn))
    assert 5 * STEP_CHUNK < 4 * 5.3e6


@QUICK
@given(drawn=values())
def test_a_fused_update_costs_at_most_the_step_of_one_tensor(drawn: dict[str, Any]) -> None:
    """Inside the backward pass the update stands beside activations, which it does not where it comes after."""
    drawn = {**drawn, "train.gradient_accumulation_steps": 1, "optim.max_grad_norm": None}
    key, config = "memory.fused_backward", configure(drawn)
    piece = min(STEP_CHUNK, largest_trained_matrix(config))
    most = step_bytes(piece, piece, states=config.memory.optimizer_states, masters=masters(config))
    for with_option, without, _ in by_stage(drawn, {key: True}, {key: False}):
        assert with_option <= without + most


@QUICK
@given(drawn=values(), vocab_size=st.sampled_from([512, 4096]))
def test_a_fused_update_never_raises_a_peak_that_is_the_optimizers_step(drawn: dict[str, Any], vocab_size: int) -> None:
    """Little work at once: all gradients and the step are what counts, and the fused update has neither."""
    drawn = {
        **drawn, "model.tie_word_embeddings": False, "train.sequence_length": 8,
        "train.per_device_train_batch_size": 1, "model.vocab_size": vocab_size,
        "train.gradient_accumulation_steps": 1, "optim.max_grad_norm": None, "memory.fused_backward": False,
    }  # fmt: skip
    for stage in plan(configure(drawn)).stages:
        assert stage.peak is not None
        assume(stage.peak.highest.name == "optimizer step")
    for with_option, without, _ in by_stage(drawn, FUSED, {}):
        assert with_option <= without


@QUICK
@given(drawn=values(), frozen_weights=st.sampled_from(["int8", "nf4"]))
def test_packed_weights_cost_at_most_one_matrix_made_whole(drawn: dict[str, Any], frozen_weights: str) -> None:
    """So two frozen layers of int8, or one of NF4, are needed before anything is saved at the peak."""
    key = "memory.frozen_weights"
    config = configure(drawn)
    largest = max(linear.in_features * linear.out_features for linear in plan(config).shape.linears)
    whole = unpack_bytes(frozen_weights, largest, {"bf16": 2, "fp32": 4}[config.train.precision])
    for with_option, without, saved in by_stage(drawn, {key: frozen_weights}, {key: "full"}):
        assert saved >= 0
        assert with_option <= max(without, without - saved + whole)


@QUICK
@given(drawn=values())
def test_frozen_weights_on_the_host_never_raise_the_peak(drawn: dict[str, Any]) -> None:
    key = "memory.offload_frozen"
    for with_option, without, saved in by_stage(drawn, {key: True}, {key: False}):
        assert saved >= 0
        assert with_option <= without


def test_one_or_two_frozen_layers_on_the_host_save_nothing() -> None:
    drawn = {
        "model.num_hidden_layers": 4, "plan.num_stages": 2, "pet.rank": 4, "model.vocab_size": 100,
        "model.hidden_size": 64, "model.intermediate_size": 176, "train.sequence_length": 8, "plan.total_tokens": 10**6,
    }  # fmt: skip
    for num_old, saved_layers in ((1, 0), (2, 0), (3, 1)):
        drawn["plan.layers"] = [num_old, 4 - num_old]
        (_, (with_option, without, saved)) = by_stage(drawn, {"memory.offload_frozen": True}, {})
        matrices = 4 * 64 * 64 + 3 * 64 * 176
        assert saved == without - with_option == saved_layers * 2 * matrices


@QUICK
@given(drawn=values())
def test_activations_on_the_host_never_raise_the_peak(drawn: dict[str, Any]) -> None:
    """Of models whose feed-forward has the usual width, 2 d or more: what comes back is then less than what stayed.

    Where nothing stayed, as all is computed again, two scales a layer do, if they are too small to move.
    """
    hidden = drawn["model.hidden_size"]
    drawn = {**drawn, "model.intermediate_size": max(2 * hidden, drawn["model.intermediate_size"])}
    key = "memory.offload_activations"
    stay = 8 * num_tokens(configure(drawn)) * drawn["model.num_hidden_layers"]
    stay *= bool(drawn["train.gradient_checkpointing"])
    for with_option, without, _ in by_stage(drawn, {key: True}, {key: False}):
        assert with_option <= without + stay


@QUICK
@given(drawn=values(), which=st.sampled_from([True, "frozen", "new"]))
def test_recomputing_costs_at_most_the_input_of_one_layer(drawn: dict[str, Any], which: bool | str) -> None:
    """``w N d``: of a single layer nothing is saved, and its input is kept beside what is computed again.

    And the masks, from which each layer makes its own anew.
    """
    drawn = {**drawn, "memory.offload_activations": False}
    key, config = "train.gradient_checkpointing", configure(drawn)
    inputs = {"bf16": 2, "fp32": 4}[config.train.precision] * num_tokens(config) * config.model.hidden_size
    mask = Workload.of(config, shape_from_hf_config(config.model.hf_config())).mask_bytes
    for with_option, without, _ in by_stage(drawn, {key: which}, {key: False}):
        assert with_option <= without + inputs + mask


def test_recomputing_beside_activations_on_the_host_raises_the_peak() -> None:
    """What is computed again is whole on the device; what comes back from the host, one piece after the other."""
    base = {"plan.num_stages": 1, "model.vocab_size": 1000, "memory.offload_activations": True}
    recomputed = peak_bytes(configure(base, train__gradient_checkpointing=True))
    assert recomputed > 1.1 * peak_bytes(configure(base))


@QUICK
@given(drawn=values())
def test_frozen_embeddings_never_raise_the_peak(drawn: dict[str, Any]) -> None:
    key = "plan.train_embeddings"
    for with_option, without, saved in by_stage(drawn, {key: "first_stage"}, {key: "always"}):
        assert saved >= 0
        assert with_option <= without


def test_every_option_lowers_the_peak_of_a_real_model() -> None:
    """The 368M anchor on 8 x 1024 tokens, in three stages: large enough for every bound above."""
    base = {
        "model.hidden_size": 1024, "model.intermediate_size": 2736, "model.num_hidden_layers": 24,
        "model.num_attention_heads": 16, "plan.num_stages": 3, "plan.layers": [11, 8, 5], "pet.rank": 64,
        "optim.max_grad_norm": None,
    }  # fmt: skip
    plain = peak_bytes(configure(base))
    options: list[dict[str, Any]] = [
        {"memory.optimizer_states": "8bit"},
        {"memory.master_weights": False},
        {"memory.frozen_weights": "int8"},
        {"memory.frozen_weights": "nf4"},
        {"memory.offload_frozen": True},
        {"memory.offload_activations": True},
        {"plan.train_embeddings": "adapters"},
        {"plan.train_embeddings": "first_stage"},
        {"train.gradient_checkpointing": True},
        {"train.gradient_checkpointing": "frozen"},
        {"train.gradient_checkpointing": "new"},
        {"train.loss_chunk_size": 64},
    ]
    for option in options:
        assert peak_bytes(configure({**base, **option})) < plain, option
    # Gradients are no part of this peak, which is the loss: there the fused update saves nothing.
    assert peak_bytes(configure({**base, **FUSED})) <= plain
    at_once = {
        "train.gradient_checkpointing": True,
        "train.per_device_train_batch_size": 1,
        "train.loss_chunk_size": 64,
    }
    assert peak_bytes(configure({**base, **at_once, **FUSED})) < peak_bytes(configure({**base, **at_once}))


# --- what the planner minimises ---


@QUICK
@given(drawn=values(max_layers=5))
def test_each_objective_is_best_in_its_own_measure(drawn: dict[str, Any]) -> None:
    by_peak, by_state = (plan(configure(drawn, plan__objective=objective)) for objective in ("peak", "model_state"))
    assert by_peak.peak_bytes is not None
    assert by_state.peak_bytes is not None
    assert by_peak.peak_bytes <= by_state.peak_bytes
    assert by_state.peak_model_state_bytes <= by_peak.peak_model_state_bytes


def test_the_objectives_differ_where_activations_decide() -> None:
    """Activations of all layers wait in the last stage, however few of them are new."""
    base = {"model.num_hidden_layers": 12, "pet.rank": 8, "train.per_device_train_batch_size": 1}
    layers = {
        (objective, checkpointing): plan(
            configure(base, plan__objective=objective, train__gradient_checkpointing=checkpointing)
        ).layers
        for objective in ("peak", "model_state")
        for checkpointing in (False, "frozen")
    }
    assert layers["model_state", False] == layers["model_state", "frozen"], "it knows of no activations"
    assert layers["peak", False] != layers["peak", "frozen"]


@settings(max_examples=25, deadline=None)
@given(drawn=values(), objective=st.sampled_from(["peak", "model_state"]))
def test_all_solvers_agree_under_both_objectives(drawn: dict[str, Any], objective: str) -> None:
    config = configure(drawn, plan__objective=objective)
    costs = StagePrices(config, shape_from_hf_config(config.model.hf_config()))
    num_layers, num_stages = config.model.num_hidden_layers, config.plan.num_stages
    reference = solve_exhaustive(costs.objective_bytes, num_layers, num_stages)
    for name, solve in SOLVERS.items():
        found = solve(costs.objective_bytes, num_layers, num_stages)
        assert peak_cost(costs.objective_bytes, found) == peak_cost(costs.objective_bytes, reference), name
        assert found == reference, name
    made = plan(config)
    best = made.peak_bytes if objective == "peak" else made.peak_model_state_bytes
    assert best == peak_cost(costs.objective_bytes, reference)


def test_the_peak_changes_no_hash_and_the_rank_does() -> None:
    """A run may be resumed with another micro-batch, not with another plan."""
    at_once = {"pet.rank": 8, "train.global_batch_size": 8, "plan.objective": "model_state"}
    made, smaller = (plan(configure(at_once, train__per_device_train_batch_size=size)) for size in (8, 2))
    assert made.peak_bytes != smaller.peak_bytes
    assert made.schedule.hash == smaller.schedule.hash
    assert to_json(made) != to_json(smaller)
    assert plan(configure({**at_once, "pet.rank": 16})).schedule.hash != made.schedule.hash


@QUICK
@given(drawn=values())
def test_without_freezing_the_last_stage_is_the_whole_model(drawn: dict[str, Any]) -> None:
    plain = {key: value for key, value in drawn.items() if not key.startswith("memory.")}
    config = configure(plain, method="growth", train__gradient_checkpointing=False)
    if config.plan.train_embeddings == "always":
        last = plan(config).stages[-1].peak
        assert last is not None
        in_steps = [i.memory.total_bytes for i in last.instants if i.name not in ("growth", "evaluation")]
        whole = plan(configure(plain, plan__num_stages=1, train__gradient_checkpointing=False)).stages[0].peak
        assert whole is not None
        assert max(in_steps) == max(i.memory.total_bytes for i in whole.instants if i.name != "evaluation")
