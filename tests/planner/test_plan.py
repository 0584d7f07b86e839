"""The whole plan: known answers, and what holds for every plan."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.config import RunConfig, load_config
from steplm.errors import ConfigError
from steplm.planner.plan import Plan, plan
from steplm.planner.solve import peak_cost, solve_exhaustive
from steplm.schedule import Adapter, Entry, Phase, trained_patterns
from steplm.types import from_json, to_json

LLAMA_368M = {
    "model": {
        "hidden_size": 1024,
        "intermediate_size": 2736,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
}
TINY = {
    "model": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 4,
        "vocab_size": 50,
    },
    "plan": {"num_stages": 2, "total_tokens": 10_000},
    "pet": {"rank": 4},
    "train": {"sequence_length": 16, "per_device_train_batch_size": 2},
}  # fmt: skip


def plan_of(values: dict[str, Any], *overrides: str) -> Plan:
    return plan(load_config(values, overrides))


def grown(values: dict[str, Any], *overrides: str) -> Phase:
    """The first phase of the second stage."""
    return plan_of(values, *overrides).schedule.stages[1][0]


def patterns(phase: Phase) -> tuple[str, ...]:
    """Over the trained parameters of a phase of ``TINY``."""
    return trained_patterns(phase, plan_of(TINY).shape)


@pytest.mark.parametrize("solver", ["dynamic_programming", "integer_programme"])
@pytest.mark.parametrize(
    ("num_stages", "layers", "peak_bytes", "reduction"),
    [(2, (14, 10), 3_975_946_240, 0.3247), (3, (11, 8, 5), 3_377_459_200, 0.4263)],
)
def test_368m_llama_is_divided_as_known(
    solver: str, num_stages: int, layers: tuple[int, ...], peak_bytes: int, reduction: float
) -> None:
    objective = "plan.objective=model_state"  # the source's
    made = plan_of(LLAMA_368M, f"plan.num_stages={num_stages}", f"plan.solver={solver}", objective)
    assert made.layers == layers
    assert made.shape.num_parameters() == 367_969_280
    assert made.vanilla_model_state_bytes == 5_887_508_480
    assert made.peak_model_state_bytes == peak_bytes
    assert made.reduction == pytest.approx(reduction, abs=1e-4)
    assert made.proved_optimal


def test_one_stage_is_ordinary_pre_training() -> None:
    made = plan_of(LLAMA_368M, "plan.num_stages=1")
    assert made.layers == (24,)
    assert made.peak_model_state_bytes == made.vanilla_model_state_bytes == 16 * 367_969_280
    (phase,) = made.schedule.phases
    assert (trained_patterns(phase, made.shape), phase.adapters, phase.entry) == (("*",), {}, Entry("fresh"))


@st.composite
def run_configs(draw: st.DrawFn, max_layers: int = 12) -> RunConfig:
    heads = draw(st.sampled_from([2, 4]))
    num_layers = draw(st.integers(1, max_layers))
    hidden = heads * draw(st.sampled_from([4, 8]))
    return load_config(
        {
            "model": {
                "model_type": draw(st.sampled_from(["llama", "qwen2", "gemma2"])),
                "hidden_size": hidden,
                "intermediate_size": draw(st.integers(8, 60)),
                "num_hidden_layers": num_layers,
                "num_attention_heads": heads,
                "vocab_size": draw(st.integers(2, 500)),
                "tie_word_embeddings": draw(st.booleans()),
            },
            "method": draw(st.sampled_from(["step", "growth"])),
            "plan": {
                "num_stages": draw(st.integers(1, min(4, num_layers))),
                "count_embeddings": draw(st.booleans()),
                "train_embeddings": draw(st.sampled_from(["always", "first_stage"])),
                "objective": draw(st.sampled_from(["peak", "model_state"])),
                "total_tokens": 10**6,
            },
            "growth": {"position": draw(st.sampled_from(["upper", "intermediate", "lower", "random", "even"]))},
            "pet": {"method": draw(st.sampled_from(["lora", "none"])), "rank": draw(st.integers(1, 8))},
            "train": {
                "precision": draw(st.sampled_from(["bf16", "fp32"])),
                "sequence_length": 32,
                "per_device_train_batch_size": 4,
            },
        }
    )


@settings(max_examples=150, deadline=None)
@given(config=run_configs())
def test_every_plan_is_consistent(config: RunConfig) -> None:
    made = plan(config)
    depth = 0
    for stage in made.stages:
        (phase,) = stage.phases
        assert stage.num_hidden_layers == depth + stage.num_new_layers
        assert stage.grows == bool(depth)
        if depth:
            layer_map = phase.entry.layer_map
            assert layer_map is not None
            assert layer_map.num_layers == stage.num_hidden_layers
            assert len(layer_map.new_layers) == stage.num_new_layers
            adapted = config.method == "step" and config.pet.method == "lora"
            assert tuple(phase.adapters) == (layer_map.kept_layers if adapted else ())
            assert phase.frozen_layers == (layer_map.kept_layers if config.method == "step" else ())
        depth = stage.num_hidden_layers
        assert all(term.num_bytes > 0 for term in stage.memory.terms)
    assert depth == made.shape.num_hidden_layers
    assert from_json(Plan, to_json(made)) == made
    assert plan(config) == made


@settings(max_examples=100, deadline=None)
@given(config=run_configs(max_layers=7))
def test_no_division_has_a_smaller_peak(config: RunConfig) -> None:
    """The reference is exhaustive search over the plans that the planner itself makes by hand."""
    made = plan(config)
    num_layers, num_stages = made.shape.num_hidden_layers, made.num_stages

    def by_hand(layers: tuple[int, ...]) -> Plan:
        return plan(config.model_copy(update={"plan": config.plan.model_copy(update={"layers": list(layers)})}))

    costs: dict[tuple[int, int], int] = {}

    def cost(new: int, old: int) -> int:
        if (new, old) not in costs:
            rest = num_layers - new - old
            head = (old,) if old else ()
            tail = (rest,) if rest else ()
            values = to_json(config)
            values["plan"].update(num_stages=len(head) + 1 + len(tail), layers=[*head, new, *tail])
            stage = plan(RunConfig.model_validate(values)).stages[len(head)]
            costs[new, old] = stage.device_bytes if config.plan.objective == "peak" else stage.memory.total_bytes
        return costs[new, old]

    best = solve_exhaustive(cost, num_layers, num_stages)
    stages = made.stages
    largest = max(s.device_bytes if config.plan.objective == "peak" else s.memory.total_bytes for s in stages)
    assert largest == peak_cost(cost, best)
    if config.method == "step":
        assert made.layers == best
    assert by_hand(best).proved_optimal


@settings(max_examples=60, deadline=None)
@given(config=run_configs())
def test_bare_formula_of_the_source_is_recovered(config: RunConfig) -> None:
    values = to_json(config)
    values["method"] = "step"
    values["plan"].update(count_embeddings=False)
    values["pet"].update(method="lora")
    values["train"].update(precision="bf16")
    made = plan(RunConfig.model_validate(values))
    p = made.shape.layer_parameters
    e = sum(config.pet.rank * (linear.in_features + linear.out_features) for linear in made.shape.linears)
    old = 0
    for stage in made.stages:
        assert stage.memory.total_bytes == 16 * stage.num_new_layers * p + 2 * old * p + 16 * old * e
        old = stage.num_hidden_layers
    assert made.vanilla_model_state_bytes == 16 * made.shape.num_hidden_layers * p


def test_layers_by_hand_are_obeyed_and_proved_optimal_only_if_they_are() -> None:
    three_stages = ("plan.num_stages=3", "plan.objective=model_state")
    assert plan_of(LLAMA_368M, *three_stages, "plan.layers=[11,8,5]").proved_optimal
    by_hand = plan_of(LLAMA_368M, *three_stages, "plan.layers=[12,6,6]")
    assert by_hand.layers == (12, 6, 6)
    assert not by_hand.proved_optimal


def test_layers_that_do_not_fit_a_given_shape_are_refused() -> None:
    config = load_config(TINY, ["plan.layers=[6,6]"])
    other = plan_of(TINY, "model.num_hidden_layers=10").shape
    with pytest.raises(ConfigError, match=r"\[6, 6\] adds up to 12, but the model has 10"):
        plan(config, other)


def test_without_freezing_layers_are_divided_evenly_and_everything_is_trained() -> None:
    made = plan_of(TINY, "plan.num_stages=3", "method=growth", "model.num_hidden_layers=11")
    assert made.layers == (4, 4, 3)
    assert {patterns(phase) for phase in made.schedule.phases} == {("*",)}
    assert not any(phase.has_adapters for phase in made.schedule.phases)
    assert made.peak_model_state_bytes == made.vanilla_model_state_bytes


def trained(phase: Phase, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns(phase))


def test_only_new_layers_adapters_and_outer_parameters_are_trained_after_growth() -> None:
    phase = grown(TINY, "plan.layers=[10,2]")
    assert phase.new_layers == (8, 10)
    for layer in range(12):
        name = f"model.layers.{layer}.self_attn.q_proj"
        assert trained(phase, f"{name}.weight") == (layer in (8, 10))
    assert trained(phase, "model.layers.1.self_attn.q_proj.lora_A")
    assert trained(phase, "model.layers.11.mlp.up_proj.lora_B")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert trained(phase, name)


def test_layer_one_does_not_train_layer_eleven() -> None:
    phase = grown(TINY, "plan.layers=[11,1]", "growth.position=lower", "pet.method=none")
    assert patterns(phase)[0] == "model.layers.1.*"
    assert not trained(phase, "model.layers.11.mlp.up_proj.weight")
    assert not any("lora" in pattern for pattern in patterns(phase))


def test_embeddings_can_be_frozen_after_the_first_stage() -> None:
    always = plan_of(TINY, "plan.layers=[7,5]")
    first = plan_of(TINY, "plan.layers=[7,5]", "plan.train_embeddings=first_stage")
    outer = always.shape.outer_parameters
    assert first.stages[0] == always.stages[0]
    assert not trained(first.schedule.phases[1], "model.embed_tokens.weight")
    assert always.stages[1].memory.total_bytes - first.stages[1].memory.total_bytes == 14 * outer


def test_first_stage_embeddings_without_freezing_train_every_layer_and_nothing_outside() -> None:
    stage = plan_of(TINY, "method=growth", "plan.train_embeddings=first_stage").stages[1]
    (phase,) = stage.phases
    assert all(trained(phase, f"model.layers.{i}.mlp.up_proj.weight") for i in range(12))
    assert not trained(phase, "lm_head.weight")
    assert stage.memory.bytes_of("frozen_layers") == 0


def test_adapters_have_alpha_four_times_the_rank_and_every_linear_map_by_default() -> None:
    def adapter(*overrides: str) -> Adapter:
        (only,) = set(grown(TINY, *overrides).adapters.values())
        return only

    default = adapter()
    assert (default.method, default.rank, default.alpha, default.scaling) == ("lora", 4, 16.0, 4.0)
    assert default.target_modules == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    few = adapter("pet.alpha=8", "pet.target_modules=[v_proj,q_proj]")
    assert (few.scaling, few.target_modules) == (2.0, ("q_proj", "v_proj"))


def test_a_rank_larger_than_a_matrix_is_refused_with_its_numbers() -> None:
    with pytest.raises(ConfigError, match=r"pet\.rank=17 .* 16, of self_attn\.q_proj \(16 x 16\)") as caught:
        plan_of(TINY, "pet.rank=17")
    assert (caught.value.rank, caught.value.largest_rank) == (17, 16)


def test_a_plan_without_adapters_does_not_mind_the_rank() -> None:
    for override in ("plan.num_stages=1", "pet.method=none", "method=growth"):
        assert not any(phase.has_adapters for phase in plan_of(TINY, "pet.rank=1000", override).schedule.phases)


def test_a_misspelt_target_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"no linear map 'q_prj'. Did you mean 'q_proj'"):
        plan_of(TINY, "pet.target_modules=[q_prj]")
    with pytest.raises(ConfigError, match=r"no linear map 'self_attn\.v_proj'. Did you mean 'v_proj'"):
        plan_of(TINY, "pet.target_modules=[self_attn.v_proj]")


def test_the_seed_moves_random_growth_only() -> None:
    random = [grown(TINY, "growth.position=random", f"seed={seed}").entry for seed in range(8)]
    assert len(set(random)) > 1
    upper = [grown(TINY, f"seed={seed}").entry for seed in range(8)]
    assert len(set(upper)) == 1


def test_stacking_goes_on_top() -> None:
    phase = grown(TINY, "growth.operator=stack")
    assert phase.new_layers == tuple(range(phase.num_hidden_layers))[-len(phase.new_layers) :]


def test_a_flop_budget_buys_more_tokens_where_layers_are_frozen_without_adapters() -> None:
    budget = ("plan.total_tokens=null", "plan.total_flops=1e13", "plan.layers=[6,6]")
    everything = plan_of(TINY, *budget, "method=growth")
    frozen = plan_of(TINY, *budget, "pet.method=none")
    outer_too = plan_of(TINY, *budget, "pet.method=none", "plan.train_embeddings=first_stage")
    assert everything.total_tokens < frozen.total_tokens < outer_too.total_tokens


def test_without_adapters_and_outer_training_the_backward_pass_stops_at_the_lowest_new_layer() -> None:
    overrides = (
        "plan.total_tokens=null", "plan.total_flops=1e13", "plan.layers=[9,3]", "pet.method=none",
        "plan.train_embeddings=first_stage",
    )  # fmt: skip
    lower, upper = (plan_of(TINY, *overrides, f"growth.position={p}").total_tokens for p in ("lower", "upper"))
    assert lower < upper
    lower, upper = (
        plan_of(TINY, *overrides, "pet.method=lora", f"growth.position={p}").total_tokens for p in ("lower", "upper")
    )
    assert lower == upper
