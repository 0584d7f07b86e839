"""The inverse plan: what it answers fits, one more does not, and the plan of its overrides is the same."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steplm.config import RunConfig, load_config
from steplm.cost.seconds import published_speeds
from steplm.errors import ConfigError, PlanInfeasible
from steplm.planner.fit import MAX_ALTERNATIVES, Alternative, fit, suggestions
from steplm.planner.hours import stage_times
from steplm.planner.ladder import AXES, LADDER, RUNGS
from steplm.planner.plan import Plan, plan
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.stages import StagePrices
from steplm.planner.ways import ways

TINY: dict[str, Any] = {
    "model": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 64,
    },
    "plan": {"num_stages": 2, "total_tokens": "100M"},
    "pet": {"rank": 16},
    "train": {"sequence_length": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
    "memory": {"reserve": 1000},
}  # fmt: skip
STEP = {"depth": 1, "width": 32, "batch": 1, "sequence": 64}
KEY = {
    "depth": "model.num_hidden_layers",
    "batch": "train.per_device_train_batch_size",
    "sequence": "train.sequence_length",
}


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, overrides)


SHAPE = shape_from_hf_config(tiny().model.hf_config())


def plan_of(row: Alternative, *more: str) -> Plan:
    return plan(tiny(*row.overrides, *more))


def written_bytes(*overrides: str) -> int:
    config = tiny(*overrides)
    return (plan(config).peak_bytes or 0) + config.memory.reserve


def one_more(row: Alternative, axis: str) -> list[str]:
    assert row.value is not None
    value = row.value + STEP[axis]
    if axis == "width":
        intermediate = 16 * round(value * 176 / 64 / 16)
        sizes = {"hidden_size": value, "intermediate_size": intermediate}
        heads = {"num_attention_heads": value // 16, "num_key_value_heads": value // 32}
        return [f"model.{key}={size}" for key, size in {**sizes, **heads}.items()]
    return [f"{KEY[axis]}={value}", *(["model.max_position_embeddings=100000000"] if axis == "sequence" else [])]


@settings(max_examples=25, deadline=None)
@given(
    num_layers=st.integers(2, 9),
    num_stages=st.integers(1, 4),
    checkpointing=st.sampled_from(["false", "frozen", "new", "true"]),
    position=st.sampled_from(["upper", "lower", "even", "random"]),
    objective=st.sampled_from(["peak", "model_state"]),
    option=st.sampled_from(
        ["memory.offload_frozen=true", "memory.frozen_weights=nf4", "pet.method=none", "pet.rank=8"]
    ),
    batch=st.integers(1, 40),
    devices=st.sampled_from([1, 1, 3, 8]),
)
def test_the_depth_is_divided_as_the_plan_divides_it(
    num_layers: int,
    num_stages: int,
    checkpointing: str,
    position: str,
    objective: str,
    option: str,
    batch: int,
    devices: int,
) -> None:
    assume(num_stages <= num_layers)
    assume(devices == 1 or option.startswith("pet."))
    settings_of_run = (
        f"model.num_hidden_layers={num_layers}", f"plan.num_stages={num_stages}", f"growth.position={position}",
        f"train.gradient_checkpointing={checkpointing}", f"plan.objective={objective}", option,
        f"train.per_device_train_batch_size={batch}", f"distributed.world_size={devices}",
    )  # fmt: skip
    made, best = plan(tiny(*settings_of_run)), fit(tiny(*settings_of_run), 10**12, vary=()).best
    assert (made.layers, made.peak_bytes) == (best.layers, best.peak_bytes)


VARIANTS = (
    (),
    ("plan.objective=model_state",),
    ("method=growth",),
    ("distributed.world_size=4", "train.global_batch_size=16", "train.gradient_accumulation_steps=1"),
    ("plan.num_stages=1", "method=lora"),
    ("plan.num_stages=1", "method=relora", "pet.warm_start=0.25", "pet.restarts=3"),
    ("pet.rank=24",),  # more than the least width allows
    ("memory.fused_backward=true", "optim.max_grad_norm=null", "train.gradient_accumulation_steps=1"),
)


def within_reach(share: float, maximize: str | None) -> float:
    """A share of the written bytes; smaller for depth, because the search for deep models takes long."""
    return 1 + (share - 1) / 5 if maximize == "depth" else share


@pytest.mark.parametrize(
    ("maximize", "more"),
    [
        # The search for deep models takes long.
        pytest.param(axis, more, marks=pytest.mark.slow) if axis == "depth" and more else (axis, more)
        for axis, more in product([None, *AXES], VARIANTS)
    ],
)
def test_every_row_is_the_plan_of_its_overrides_and_fits(maximize: str | None, more: tuple[str, ...]) -> None:
    config = tiny(*more)
    budget = int(written_bytes(*more) * within_reach(1.5, maximize))
    result = fit(config, budget, maximize=maximize, vary=("stages", "options"))
    assert 1 <= len(result.alternatives) <= MAX_ALTERNATIVES
    for row in result.alternatives:
        assert row.needed_bytes == row.peak_bytes + 1000 <= budget
        assert row.fits
        if sum(row.layers) > 60:
            continue  # the plan's own solver takes the square of the depth
        made = plan(tiny(*more, *row.overrides))
        assert (made.layers, made.peak_bytes) == (row.layers, row.peak_bytes)
        assert made.peak_model_state_bytes == row.model_state_bytes
        assert made.shape.num_parameters() == row.num_parameters


@settings(max_examples=10, deadline=None)
@given(share=st.floats(1.0, 2.0), maximize=st.sampled_from(list(AXES)), vary=st.sampled_from(["options", "stages"]))
def test_one_more_does_not_fit(share: float, maximize: str, vary: str) -> None:
    budget = int(written_bytes() * within_reach(share, maximize))
    rows = fit(tiny(), budget, maximize=maximize, vary=[vary]).alternatives
    for row in [row for row in rows if sum(row.layers) <= 30][:3]:
        with pytest.raises(PlanInfeasible, match="fit"):
            plan_of(row, *one_more(row, maximize), f"plan.budget={budget}")


@settings(max_examples=8, deadline=None)
@given(low=st.floats(0.7, 1.5), more=st.floats(1.0, 2.0), maximize=st.sampled_from(list(AXES)))
def test_more_budget_never_gives_a_smaller_answer(low: float, more: float, maximize: str) -> None:
    values = []
    for share in (low, low * more):
        budget = int(written_bytes() * within_reach(share, maximize))
        best = fit(tiny(), budget, maximize=maximize, vary=["options"]).best
        values.append(best.value or 0)
    assert values[0] <= values[1]


@pytest.mark.parametrize("maximize", [None, *AXES])
def test_no_row_is_worse_than_another_in_everything(maximize: str | None) -> None:
    rows = fit(tiny(), written_bytes(), maximize=maximize).alternatives
    time_alone = {rung.name for rung in RUNGS if not rung.quality}
    for row, other in product(rows, rows):
        pair = [(-(r.value or 0), r.price, r.flops, r.peak_bytes) for r in (row, other)]
        assert row is other or any(mine < its for mine, its in zip(*pair, strict=True))
        pair = [(-(r.value or 0), r.quality_price, r.flops, r.peak_bytes, r.host_bytes) for r in (row, other)]
        is_leaner = time_alone & set(row.options) <= time_alone & set(other.options)
        assert maximize or row is other or not is_leaner or any(its < mine for mine, its in zip(*pair, strict=True))
    ranked = sorted(rows, key=lambda r: (-(r.value or 0), bool(r.overrides), r.price, r.flops, r.peak_bytes))
    assert list(rows) == ranked


def needed_by_others(row: Alternative) -> set[str]:
    """Keys that options of this row require."""
    return {key for rung in RUNGS if rung.name in row.options for key, _ in rung.needs}


@pytest.mark.parametrize("maximize", ["batch", "sequence"])
def test_a_larger_size_has_no_option_that_costs_time_and_is_not_needed(maximize: str) -> None:
    budget = int(1.5 * written_bytes())
    for row in fit(tiny(), budget, maximize=maximize).alternatives:
        for rung in RUNGS:
            if not rung.quality and rung.name in row.options and rung.key not in needed_by_others(row):
                others = [each for each in row.overrides if not each.startswith(f"{rung.key}=")]
                without = plan(tiny(*others))
                is_too_much = (without.peak_bytes or 0) + 1000 > budget or without.host_bytes > row.host_bytes
                assert is_too_much, (row.overrides, rung.name)


@pytest.mark.parametrize("maximize", list(AXES))
@pytest.mark.parametrize(
    "more",
    [
        ("pet.rank=24",),  # refused below a width of 48
        # Below a micro-batch of 4 there would be accumulation, which is refused.
        ("memory.fused_backward=true", "optim.max_grad_norm=null", "train.gradient_accumulation_steps=1"),
    ],
)
def test_a_size_that_is_refused_hides_no_larger_one(maximize: str, more: tuple[str, ...]) -> None:
    written = AXES[maximize].value(tiny(*more), AXES[maximize].index(tiny(*more)))
    best = fit(tiny(*more), written_bytes(*more), maximize=maximize, vary=()).best
    assert best.value is not None
    assert best.value >= written
    with pytest.raises(PlanInfeasible, match="the smallest peak is"):
        fit(tiny(*more), 2000, maximize=maximize, vary=())


def test_adapters_on_every_layer_have_options_for_frozen_layers() -> None:
    lora = ("plan.num_stages=1", "method=lora")
    found, skipped = ways(tiny(*lora), SHAPE, ["options", "rank"])
    assert {option for way in found for option in way.options} >= {"recompute frozen layers", "nf4 frozen"}
    assert {way.changes["pet.rank"] for way in found} == {16, 8}
    assert [reason for reason in skipped if "adapters on embeddings" in reason]
    recomputed = StagePrices(tiny(*lora, "train.gradient_checkpointing=true"), SHAPE)
    assert recomputed.mean_flops_per_token(8, 0, recomputed=True) > recomputed.mean_flops_per_token(8, 0)


def test_what_fits_as_written_comes_first() -> None:
    needed = written_bytes()
    best = fit(tiny(), needed).best
    assert (best.overrides, best.price, best.options, best.needed_bytes) == ((), 0, (), needed)
    assert fit(tiny(), needed - 1).best.overrides


def test_where_the_run_as_written_does_not_fit_fewer_frozen_stages_come_first() -> None:
    rows = fit(load_config("llama_1.2b"), 24 * 2**30).alternatives
    assert rows[0].num_stages == 1
    assert [row.price for row in rows] == sorted(row.price for row in rows)


def test_a_family_whose_activations_are_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"phi3.*--simulate"):
        fit(tiny("model.model_type=phi3"), 10**12)


def test_a_run_that_no_plan_allows_is_refused_with_the_reason() -> None:
    config = load_config("llama_368m", ["method=vanilla", "plan.num_stages=3"])
    with pytest.raises(ConfigError, match=r"method=vanilla has one stage: set plan\.num_stages=1"):
        fit(config, 24 * 2**30)


def test_too_small_a_budget_names_the_smallest_peak_and_what_it_needs() -> None:
    with pytest.raises(PlanInfeasible) as caught:
        fit(tiny(), 10_000)
    smallest = caught.value.smallest
    assert not smallest.fits
    assert plan_of(smallest).peak_bytes == smallest.peak_bytes == caught.value.peak_bytes
    assert caught.value.needed_bytes == smallest.peak_bytes + 1000
    assert fit(tiny(), smallest.needed_bytes).best.peak_bytes == smallest.peak_bytes
    with pytest.raises(PlanInfeasible):
        fit(tiny(), smallest.needed_bytes - 1)


def test_nothing_changes_that_may_not() -> None:
    for row in fit(tiny(), written_bytes() * 2, maximize="depth", vary=()).alternatives:
        assert [override.partition("=")[0] for override in row.overrides] == ["model.num_hidden_layers"]
    for row in fit(tiny(), written_bytes(), vary=("stages",)).alternatives:
        assert row.options == ()
        assert row.rank in (None, 16)
        assert [override.partition("=")[0] for override in row.overrides] in ([], ["plan.num_stages"])
    for row in fit(tiny("memory.frozen_weights=nf4", "train.gradient_checkpointing=true"), 10**9).alternatives:
        assert not any("frozen_weights" in override or "checkpointing" in override for override in row.overrides)


def test_a_list_with_an_entry_for_each_stage_fixes_their_number() -> None:
    rows = fit(tiny("optim.learning_rate=[1e-3,5e-4]"), 10**9).alternatives
    assert {row.num_stages for row in rows} == {2}


def test_layers_by_hand_stay_where_stages_and_depth_do() -> None:
    config = tiny("plan.layers=[2,6]")
    rows = fit(config, 10**9).alternatives
    assert rows[0].layers == (2, 6)
    assert rows[0].overrides == ()
    for row in rows:
        assert (row.layers == (2, 6)) == (row.num_stages == 2) == ("plan.layers=null" not in row.overrides)
        assert plan(load_config(TINY, ["plan.layers=[2,6]", *row.overrides])).peak_bytes == row.peak_bytes


def test_a_fused_backward_comes_with_what_it_needs_and_its_price_grows_with_accumulation() -> None:
    # Without host memory: an optimizer there takes the place of a fused update.
    short = (
        "plan.num_stages=1", "train.per_device_train_batch_size=1", "train.sequence_length=128",
        "plan.host_budget=1KiB",
    )  # fmt: skip
    smallest = []
    for steps in (8, 1):
        with pytest.raises(PlanInfeasible) as caught:
            fit(
                load_config("llama_1.2b", [f"train.gradient_accumulation_steps={steps}", *short]),
                10_000,
                vary=["options"],
            )
        smallest.append(caught.value.smallest)
    assert [row.options[-1] for row in smallest] == ["fused backward", "fused backward"]
    assert smallest[0].price == smallest[1].price + 3  # log2 of 8
    needed = {"train.gradient_accumulation_steps=1"}
    assert [needed & set(row.overrides) for row in smallest] == [needed, set()]


def test_an_option_that_another_takes_the_place_of_is_not_named() -> None:
    for row in fit(tiny(), 10**9, maximize="batch").alternatives:
        assert not {"recompute frozen layers", "recompute all layers"} <= set(row.options)
        assert not {"int8 frozen", "nf4 frozen"} <= set(row.options)


def test_one_stage_has_no_option_for_frozen_layers() -> None:
    with pytest.raises(PlanInfeasible) as caught:
        fit(tiny("plan.num_stages=1"), 10_000, vary=["options"])
    options = caught.value.smallest.options
    assert options[0] == "recompute all layers"
    assert not any("frozen" in name or "embeddings" in name for name in options)


def test_refused_and_useless_options_are_skipped_with_the_reason() -> None:
    skipped = fit(tiny("train.compile=true", "train.precision=fp32"), 10**9).skipped
    assert any(line.startswith("frozen in host memory: memory.offload_frozen fetches") for line in skipped)
    assert any(line.startswith("no master weights: ") and "fp32" in line for line in skipped)
    skipped = fit(tiny("pet.method=none", "method=growth"), 10**9).skipped
    assert any(line.startswith("int8 frozen: method=growth freezes no layer") for line in skipped)


def test_batches_keep_the_tokens_of_a_step() -> None:
    result = fit(tiny(), written_bytes() * 2, maximize="batch", vary=())
    train = tiny(*result.best.overrides).train
    assert train.per_device_train_batch_size == result.best.value
    assert train.gradient_accumulation_steps == round(4 * 8 / train.per_device_train_batch_size)


def test_a_batch_leaves_a_step_for_every_stage() -> None:
    best = fit(tiny("plan.total_tokens=10000"), 2**50, maximize="batch", vary=()).best
    assert all(stage.tokens > 0 for stage in plan_of(best, "plan.total_tokens=10000").stages)
    with pytest.raises(ConfigError, match="less than one optimizer step"):
        plan_of(best, "plan.total_tokens=10000", *one_more(best, "batch"), "train.gradient_accumulation_steps=1")


def test_widths_keep_the_size_of_a_head() -> None:
    for row in fit(tiny(), written_bytes() * 2, maximize="width").alternatives:
        model = tiny(*row.overrides).model
        assert model.hidden_size == row.value == 16 * model.num_attention_heads
        assert model.num_attention_heads == 2 * (model.num_key_value_heads or 0)
        assert model.intermediate_size % 16 == 0
        assert abs(model.intermediate_size - model.hidden_size * 176 / 64) <= 8


def test_widths_are_the_same_with_the_key_value_heads_of_the_family_written_or_not() -> None:
    base = ("model.model_type=mistral", "model.num_attention_heads=16", "model.hidden_size=128")
    written = tiny(*base, "model.num_key_value_heads=8")
    values = written.model_dump(exclude_unset=True)
    del values["model"]["num_key_value_heads"]
    values["model"]["extra"] = {**values["model"].get("extra", {}), "transformers_version": "5"}
    budget = written_bytes() * 8
    rows, others = (fit(config, budget, maximize="width") for config in (written, load_config(values)))
    assert [row.overrides for row in rows.alternatives] == [row.overrides for row in others.alternatives]


def recomputed_flops(config: RunConfig, num_new: int, num_old: int) -> int:
    """A token of the one phase of a stage."""
    prices = StagePrices(config, SHAPE)
    (draft,) = prices.drafts(num_new, num_old)
    return prices.cost_of_draft(draft).recomputed_flops_per_token


def test_recomputing_every_layer_costs_one_more_forward_pass() -> None:
    config = tiny("plan.num_stages=1", "train.gradient_checkpointing=true")
    matrices = 8 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
    assert recomputed_flops(config, 8, 0) == 2 * matrices + 8 * 4 * 64 * 64
    frozen = tiny("train.gradient_checkpointing=frozen", "pet.target_modules=[q_proj]")
    assert recomputed_flops(frozen, 8, 0) == 0
    one_layer = matrices // 8 + 16 * (64 + 64)  # a frozen one with its adapters
    assert recomputed_flops(frozen, 5, 3) == 3 * (2 * one_layer + 4 * 64 * 64)


def test_flops_are_those_of_all_tokens() -> None:
    best = fit(tiny("plan.num_stages=1"), 2**40).best
    made = plan(tiny("plan.num_stages=1"))
    (cost,) = made.costs
    assert best.flops == made.total_tokens * cost.flops_per_token


def test_suggestions_are_overrides_that_fit_and_at_most_three() -> None:
    budget = written_bytes() * 3 // 4
    _, *lines = suggestions(tiny(), budget).splitlines()
    assert 1 <= len(lines) <= 3
    for line in lines:
        plan(tiny(*line.partition("  (")[0].split(), f"plan.budget={budget}"))
    assert suggestions(tiny(), 10_000).startswith("nothing fits")
    assert "The reserve alone exceeds the budget" in suggestions(tiny("memory.reserve=1GiB"), 2**20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"vary": ["stage"]}, "Did you mean 'stages'"), ({"maximize": "dept"}, "Did you mean 'depth'")],
)
def test_an_unknown_name_is_told_the_nearest(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tiny(), 10**9, **arguments)


def test_more_stages_come_after_options_that_cost_less_quality_where_layers_are_frozen() -> None:
    cheaper = {"8-bit states", "no master weights", "nf4 frozen"}
    for method, freezes in (("step", True), ("growth", False)):
        config = tiny(f"method={method}")
        found, _ = ways(config, SHAPE, ("stages", "options"))
        more_stages = min(way.price for way in found if way.num_stages == config.plan.num_stages + 1)
        with_options = [
            way.price for way in found if way.num_stages == config.plan.num_stages and cheaper & set(way.options[-1:])
        ]
        assert with_options
        assert all((price < more_stages) is freezes for price in with_options)


def test_prices_rise_along_the_ladder_and_every_rung_says_what_it_costs() -> None:
    prices = [rung.price for rung in LADDER]
    assert prices == sorted(set(prices))
    for rung in LADDER:
        assert rung.time or rung.quality
        assert rung.value not in rung.replaces
        section, _, name = rung.key.partition(".")
        assert hasattr(getattr(tiny(), section), name)


def test_the_seconds_of_a_row_are_those_of_its_plan() -> None:
    speeds = published_speeds("l4")
    for row in fit(tiny(), written_bytes(), vary=("options",), speeds=speeds).alternatives:
        made, config = plan_of(row), tiny(*row.overrides)
        times = stage_times(config, made, speeds)
        assert times is not None
        assert row.seconds == pytest.approx(sum(time.seconds for time in times), rel=1e-6)


@pytest.mark.parametrize("more", [(), ("method=growth",), ("train.per_device_train_batch_size=16",)])
def test_no_option_is_taken_that_costs_time_alone_and_saves_no_memory(more: tuple[str, ...]) -> None:
    keys, found = {rung.name: rung.key for rung in RUNGS if not rung.quality}, 0
    for row in fit(tiny(*more), written_bytes(*more)).alternatives:
        for name in keys.keys() & set(row.options):
            if keys[name] in needed_by_others(row):
                continue
            without = [override for override in row.overrides if not override.startswith(f"{keys[name]}=")]
            made = plan(tiny(*more, *without))
            found += 1
            assert (made.peak_bytes or 0) > row.peak_bytes or made.host_bytes > row.host_bytes
    assert found


def test_with_a_device_no_option_is_taken_that_costs_time_alone_and_is_not_needed() -> None:
    speeds, budget = published_speeds("h200"), int(written_bytes() * 0.8)
    rows = fit(tiny(), budget, vary=("options",), speeds=speeds).alternatives
    time_alone = {rung.name for rung in LADDER if not rung.quality}
    keys = {rung.name: rung.key for rung in LADDER}
    found = 0
    for row in rows:
        for name in time_alone & set(row.options):
            without = [override for override in row.overrides if not override.startswith(f"{keys[name]}=")]
            config = tiny(*without)
            found += 1
            needed = config.memory.needed_bytes(plan(config).peak_bytes or 0)
            times = stage_times(config, plan(config), speeds)
            assert times is not None
            # It does not fit, or it would take as long.
            assert needed > budget or sum(time.seconds for time in times) >= (row.seconds or 0) * 0.999
    assert found


def test_with_a_device_rows_of_one_quality_are_ranked_by_time() -> None:
    budget, speeds = int(written_bytes() * 0.8), published_speeds("h200")
    rows = fit(tiny(), budget, vary=("options", "stages"), speeds=speeds).alternatives
    order = [(bool(row.overrides), row.quality_price, row.seconds) for row in rows]
    assert order == sorted(order)


def test_an_option_that_several_stages_do_not_allow_is_offered_for_one() -> None:
    """Four devices cannot share 8-bit states of adapters of 5461 x 128."""
    config = load_config("llama_1.2b", ["distributed.world_size=4"])
    result = fit(config, 24 * 2**30, vary=["stages", "options"])
    in_8_bits = [row for row in result.alternatives if "8-bit states" in row.options]
    assert in_8_bits
    assert {row.num_stages for row in in_8_bits} == {1}


def test_alternatives_differ_in_more_than_the_order_of_their_settings() -> None:
    config = load_config("llama_7b", ["method=auto"])
    result = fit(config, 24 * 10**9, speeds=published_speeds("rtx4090"))
    assert len({frozenset(row.overrides) for row in result.alternatives}) == len(result.alternatives)
    for row in result.alternatives:
        assert ("trained layers in host memory" in row.options) <= ("optimizer in host memory" in row.options)
