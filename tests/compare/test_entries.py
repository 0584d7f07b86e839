"""A suite's YAML becomes runs: methods, settings, learning rates, seeds, and the match with the baseline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from steplm.compare.check import check_plans, check_texts
from steplm.compare.entries import RunKey, Suite, _as_name
from steplm.compare.methods import METHODS
from steplm.compare.suite import dump_suite, read_suite
from steplm.config import OptimConfig
from steplm.errors import ConfigError, DataError
from steplm.sft.config import SftConfig

Values = Callable[..., dict[str, Any]]
GRID = {"learning_rates": [1e-3, 1e-2], "seed": 3}


def _suite(values: dict[str, Any], *overrides: str) -> Suite:
    return Suite(read_suite(values, overrides))


def test_varied_keys_make_one_entry_for_each_combination(suite_values: Values, tmp_path: Path) -> None:
    varied = {"growth.position": ["lower", "random"], "pet.rank": [2, 4]}
    entries = [
        {"name": "vanilla", "method": "vanilla"},
        {"name": "step_2", "method": "step", "set": {"pet.alpha": 8}, "label": "S"},
        {"name": "grid", "like": "step_2", "vary": varied},
    ]
    questions = [{"title": "where", "entries": ["step_2", "grid=*,2"], "baseline": "step_2"}]
    suite = _suite(suite_values(tmp_path, entries=entries, questions=questions))
    grid = [f"grid={position},{rank}" for position in ("lower", "random") for rank in (2, 4)]
    assert list(suite.entries) == ["vanilla", "step_2", *grid]
    entry = suite.entries["grid=random,2"]
    assert dict(entry.settings) == {"pet.alpha": 8, "growth.position": "random", "pet.rank": 2}
    assert entry.label == "S, position random, rank 2"
    assert suite.questions[0].entries == ("step_2", "grid=lower,2", "grid=random,2")
    config = suite.run_config(RunKey(entry.name, 5, 2e-3))
    assert (config.growth.position, config.pet.rank, config.pet.alpha) == ("random", 2, 8)
    assert (config.seed, config.optim.learning_rate) == (5, 2e-3)
    assert config.run_dir == tmp_path / "runs/grid=random,2/lr0.002-seed5"


def test_entries_that_are_not_tuned_have_the_default_rates_of_their_methods(
    suite_values: Values, tmp_path: Path
) -> None:
    values = suite_values(tmp_path)
    values["run"]["optim"] = {"warmup_ratio": 0.1}
    values["entries"] = [
        {"name": "vanilla", "method": "vanilla"},
        {"name": "step", "method": "step"},
        {"name": "muon", "method": "vanilla", "set": {"optim.name": "muon"}},
        {"name": "like", "like": "muon", "set": {"optim.weight_decay": 0.0}},
    ]
    suite = _suite(values)
    assert suite.run_config(suite.baseline_run(0)).model.hidden_size == 32
    rates = {run.entry: run.learning_rate for run in suite.expected_runs({})}
    assert rates == {"vanilla": 0.022, "step": 0.011, "muon": 0.014, "like": 0.014}
    assert _suite(values, "optim.learning_rate=0.5").fixed_rate(suite.entries["muon"]) == 0.5


def test_tuned_entries_run_the_grid_at_one_seed_and_the_seeds_at_one_rate(suite_values: Values, tmp_path: Path) -> None:
    entries = [
        {"name": "vanilla", "method": "vanilla"},
        {"name": "own", "method": "step", "learning_rates": [0.5]},
        {"name": "alike", "like": "vanilla", "seeds": [7]},
        {"name": "fixed", "method": "step", "tune": False},
        {"name": "set", "like": "own", "set": {"optim.learning_rate": 0.25}, "seeds": [1]},
    ]
    suite = _suite(suite_values(tmp_path, entries=entries, tune=GRID, seeds=[0, 1]))

    def runs(name: str, chosen: dict[str, float | None]) -> set[tuple[int, float]]:
        return {(run.seed, run.learning_rate) for run in suite.possible_runs(suite.entries[name], chosen)}

    grid = {(3, 1e-3), (3, 1e-2)}
    assert runs("vanilla", {}) == grid | {(0, 1e-3), (1, 1e-3), (0, 1e-2), (1, 1e-2)}
    assert runs("vanilla", {"vanilla": 1e-2}) == grid | {(0, 1e-2), (1, 1e-2)}
    assert [run.entry for run in suite.expected_runs({})].count("vanilla") == 4
    assert runs("own", {}) == {(3, 0.5), (0, 0.5), (1, 0.5)}
    assert runs("alike", {}) == {(7, 1e-3), (7, 1e-2)}
    assert runs("alike", {"vanilla": 1e-3}) == {(7, 1e-3)}
    assert runs("fixed", {}) == {(0, 1e-2), (1, 1e-2)}
    assert runs("set", {}) == {(1, 0.25)}


def test_the_runs_of_a_grid_that_grew_are_expected_too(suite_values: Values, tmp_path: Path) -> None:
    tune = {"learning_rates": [1e-3, 1e-2], "seed": 0, "extend": 2, "refine": 1, "finalists": 2}
    entries = [{"name": "vanilla", "method": "vanilla"}]
    suite = _suite(suite_values(tmp_path, entries=entries, tune=tune, seeds=[0, 1, 2]))

    def number(chosen: dict[str, float | None], *known: tuple[int, float]) -> int:
        return len(suite.expected_runs(chosen, [RunKey("vanilla", seed, rate) for seed, rate in known]))

    assert number({}) == 2 + 2 * 2  # the grid, and two more seeds of two rates
    grown = [(0, 1e-3), (0, 1e-2), (0, 0.1), (0, 0.0316)]
    assert number({}, *grown) == 4 + 2 * 2
    assert number({}, *grown, (1, 0.0316), (2, 0.0316)) == 4 + 2 * 2
    finalists = [(seed, rate) for seed in (1, 2) for rate in (0.0316, 0.1)]
    assert number({}, *grown, *finalists) == number({"vanilla": 0.1}, *grown, *finalists) == 8


def test_every_method_makes_a_plan_of_the_same_tokens(suite_values: Values, tmp_path: Path) -> None:
    entries = [{"name": name, "method": name} for name in METHODS]
    suite = _suite(suite_values(tmp_path, entries=entries), "plan.layers=[3,1]", "pet.rank=4", "optim.rank=4")
    runs = check_plans(suite)
    assert {run.entry for run in runs} == set(METHODS)
    assert {suite.plan(run).total_tokens for run in runs} == {512}
    optimizers = {suite.run_config(run).optim.name for run in runs}
    assert optimizers == set(get_args(OptimConfig.model_fields["name"].annotation))


def test_an_entry_matched_on_flops_has_the_baselines_to_one_step(suite_values: Values, tmp_path: Path) -> None:
    entries = [
        {"name": "vanilla", "method": "vanilla"},
        {"name": "step_2", "method": "step"},
        {"name": "equal", "like": "step_2", "match": "flops"},
    ]
    suite = _suite(suite_values(tmp_path, entries=entries), "plan.total_tokens=8k")
    runs = {run.entry: run for run in check_plans(suite)}
    flops = {name: suite.plan(run).training_flops for name, run in runs.items()}
    one_step = 64 * max(stage.flops_per_token for stage in suite.plan(runs["equal"]).stages)
    assert flops["step_2"] < flops["vanilla"] - one_step
    assert abs(flops["equal"] - flops["vanilla"]) <= one_step
    assert suite.plan(runs["equal"]).total_tokens > suite.plan(runs["step_2"]).total_tokens


@pytest.mark.parametrize(
    ("match", "settings", "words"),
    [
        ("tokens", {"plan.total_tokens": 1024}, "1.02k tokens and the baseline 'vanilla' on 512: +100.00%, 8.0 optim"),
        ("tokens", {"plan.total_tokens": None, "plan.total_flops": 10**9}, "The suite is matched on tokens"),
        ("flops", {"pet.method": "none"}, None),
    ],
)
def test_what_is_not_matched_is_refused_with_the_difference(
    suite_values: Values, tmp_path: Path, match: str, settings: dict[str, Any], words: str | None
) -> None:
    entries = [{"name": "vanilla", "method": "vanilla"}, {"name": "other", "method": "step", "set": settings}]
    suite = _suite(suite_values(tmp_path, entries=entries, match=match))
    if words is None:
        assert len(check_plans(suite)) == 2
        return
    with pytest.raises(ConfigError, match="entry 'other' trains on") as caught:
        check_plans(suite)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["eval.max_tokens", "data.validation_fraction"])
def test_losses_of_other_text_than_the_baselines_are_refused(suite_values: Values, tmp_path: Path, key: str) -> None:
    value = {"eval.max_tokens": 64, "data.validation_fraction": 0.25}[key]
    entries = [{"name": "vanilla", "method": "vanilla"}, {"name": "other", "like": "vanilla", "set": {key: value}}]
    with pytest.raises(ConfigError, match=rf"entry 'other' has {key}={value}, and the baseline"):
        check_plans(_suite(suite_values(tmp_path, entries=entries)))


def test_rates_that_would_share_a_folder_are_refused(suite_values: Values, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.01 and 0\.01000004 of entry 'vanilla' are the same"):
        check_plans(_suite(suite_values(tmp_path, tune={"learning_rates": [0.01, 0.01000004]})))


def test_a_text_without_a_word_is_told_before_anything_is_trained(suite_values: Values, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "words"}\n')
    text = {"data": str(tmp_path / "a.jsonl")}
    check_texts(_suite(suite_values(tmp_path, evaluate={"words": {**text, "text_field": "content"}})))
    with pytest.raises(DataError, match=r"no text in .*a\.jsonl"):
        check_texts(_suite(suite_values(tmp_path, evaluate={"words": text})))


def test_a_grid_of_its_own_is_run_without_one_of_the_suite(suite_values: Values, tmp_path: Path) -> None:
    entries = [{"name": "vanilla", "method": "vanilla", "learning_rates": [1e-3, 1e-2]}]
    suite = _suite(suite_values(tmp_path, entries=entries))
    assert suite.entries["vanilla"].grid == (1e-3, 1e-2)


def test_negative_values_have_names_of_their_own() -> None:
    assert [_as_name(value) for value in (-0.1, 0.1, True, [1, 2])] == ["-0.1", "0.1", "True", "1-2"]


def test_without_questions_all_entries_stand_side_by_side(suite_values: Values, tmp_path: Path) -> None:
    (question,) = _suite(suite_values(tmp_path)).questions
    assert (question.entries, question.baseline) == (("vanilla", "step_2"), "vanilla")


def test_all_entries_that_are_wrong_are_named_at_once(suite_values: Values, tmp_path: Path) -> None:
    entries = [
        {"name": "vanilla", "method": "vanilla"},
        {"name": "one", "method": "step", "set": {"plan.num_stage": 2}},
        {"name": "two", "method": "step", "set": {"plan.num_stages": 9}},
    ]
    with pytest.raises(ConfigError) as caught:
        check_plans(_suite(suite_values(tmp_path, entries=entries)))
    text = str(caught.value)
    assert text.startswith("2 problems in the suite:")
    assert "entry 'one': plan has no key 'num_stage'. Did you mean 'num_stages'?" in text
    assert "entry 'two': plan.num_stages=9 is more than" in text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sedes": [0]}, "the suite has no key 'sedes'. Did you mean 'seeds'?"),
        ({"entries": [{"name": "a", "method": "step", "setting": {}}]}, "entries.0 has no key 'setting'"),
        ({"tune": {"learning_rate": [1]}}, "tune has no key 'learning_rate'. Did you mean 'learning_rates'?"),
        ({"entries": [{"name": "a", "method": "relore"}]}, "Did you mean 'relora'?"),
        ({"entries": [{"name": "a"}]}, "give either a method or"),
        ({"entries": [{"name": "a", "method": "step", "set": {"seed": 1}}]}, "'seed' is set by the suite"),
        (
            {"entries": [{"name": "a", "method": "step", "set": {"optim": {"name": "apollo"}}}]},
            "'optim' would reset every key of the section",
        ),
        (
            {"entries": [{"name": "a", "method": "step", "learning_rates": [1e-3], "tune": False}]},
            "has learning_rates, and tune: false",
        ),
        ({"evaluate": {"validation": {"data": "a.txt"}}}, "'validation' is the text of the runs themselves"),
        ({"seeds": [2**40]}, "seeds.0: Input should be less than"),
        ({"entries": [{"name": "vanilla", "method": "vanilla"}] * 2}, "two entries are called 'vanilla'"),
        ({"entries": [{"name": "a", "like": "b"}]}, "no entry 'b' above it"),
        ({"baseline": "vanila"}, "baseline: no entry 'vanila'. Did you mean 'vanilla'?"),
        ({"questions": [{"title": "t", "entries": ["stp*"]}]}, "question 't': no entry 'stp*'"),
        (
            {"tune": GRID, "entries": [{"name": "a", "method": "step", "set": {"optim.learning_rate": 1.0}}]},
            "sets optim.learning_rate and is tuned",
        ),
        ({"entries": [{"name": "a", "method": "step", "tune": True}]}, "to be tuned, but"),
        ({"afterwards": {}}, "afterwards: nothing to do: give `tasks`, `sft` or `mtbench`"),
        ({"afterwards": {"task": {}}}, "afterwards has no key 'task'. Did you mean 'tasks'?"),
        ({"afterwards": {"tasks": {"names": []}}}, "afterwards.tasks.names"),
        (
            {"afterwards": {"sft": {"data": "a.json", "learning_rates": 1}}},
            "afterwards.sft has no key 'learning_rates'. Did you mean 'learning_rate'?",
        ),
        ({"afterwards": {"sft": {"data": "a.json", "lora_alpha": 2}}}, "afterwards.sft: lora_alpha=2 is for adapters"),
        ({"afterwards": {"mtbench": {"data": "b", "judge": "j"}}}, "afterwards.mtbench has no key 'judge'"),
        ({"afterwards": {"mtbench": {"data": "b", "judge_model": "j"}}}, "has no chat template: give `sft` with one"),
        (
            {"afterwards": {"entries": "stp*", "tasks": {"names": "piqa"}}},
            "afterwards.entries: no entry 'stp*'",
        ),
        (
            {"afterwards": {"seeds": [0, 7], "tasks": {"names": "piqa"}}},
            "afterwards.seeds: entry 'vanilla' is not run at seed 7, only at 0",
        ),
    ],
)
def test_a_suite_that_cannot_be_meant_is_refused(
    suite_values: Values, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _suite(suite_values(tmp_path, **keys))
    assert words in str(caught.value)


def test_a_written_suite_is_read_back_the_same_with_its_base(suite_values: Values, tmp_path: Path) -> None:
    afterwards = {
        "tasks": {"names": "piqa", "limit": 3},
        "sft": {"data": "a.json", "max_steps": 2, "max_grad_norm": None},
        "mtbench": {"data": "b", "judge_model": "j"},
    }
    keys = {
        "tune": GRID,
        "evaluate": {"wiki": {"data": "a.txt", "max_tokens": "100k"}},
        "afterwards": afterwards,
    }
    suite = read_suite(suite_values(tmp_path, **keys), ["pet.rank=2"])
    (tmp_path / "suite.yaml").write_text(dump_suite(suite))
    again = read_suite(tmp_path / "suite.yaml")
    assert again == suite
    assert again.run["pet"]["rank"] == 2
    assert again.evaluate["wiki"].max_tokens == 100_000
    assert again.afterwards.sft.keys == SftConfig(max_steps=2, max_grad_norm=None)


def test_the_last_models_are_of_the_chosen_entries_and_seeds_the_baseline_first(
    suite_values: Values, tmp_path: Path
) -> None:
    entries = [
        {"name": "step_2", "method": "step", "seeds": [4, 0]},
        {"name": "grid", "like": "step_2", "vary": {"growth.position": ["lower"], "pet.rank": [2]}},
        {"name": "vanilla", "method": "vanilla"},
    ]

    def models(**keys: Any) -> dict[str, int]:
        afterwards = {"tasks": {"names": "piqa"}, **keys}
        suite = _suite(suite_values(tmp_path, entries=entries, seeds=[0, 1], afterwards=afterwards))
        return {name: seed for name, (_, seed) in suite.last_models.items()}

    assert models() == {"vanilla": 0, "step_2": 4, "grid=lower_2": 0}
    assert list(models()) == ["vanilla", "step_2", "grid=lower_2"]
    assert models(entries="grid=*", seeds=[0, 1]) == {"grid=lower_2-seed0": 0, "grid=lower_2-seed1": 1}
    assert _suite(suite_values(tmp_path)).last_models == {}
