"""``steplm tune``: the suite that it makes of a run, and the command that it ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steplm.cli import tune
from steplm.cli.tune import run_tune, share_for, tuning_suite
from steplm.compare.entries import RunKey, Suite
from steplm.compare.suite import read_suite
from steplm.config import RunConfig, dump_config, load_config
from steplm.cost.seconds import published_speeds
from steplm.errors import ConfigError
from steplm.planner.hours import stage_times
from steplm.planner.plan import plan
from steplm.report.suite import load_suite

Configure = Callable[..., RunConfig]
METHODS = {
    "vanilla": ["method=vanilla", "plan.num_stages=1"],
    "step": ["method=step"],
    "thawed": ["method=thawed", "optim.old_layers=apollo_mini", "memory.master_weights=true"],
    "relora": ["method=relora", "plan.num_stages=1", "pet.restarts=1", "pet.warm_start=0.5"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_is_the_run_itself_with_fewer_tokens_and_another_rate(
    method: str, tiny_run: Configure, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path / "run", "plan.total_tokens=4096", *METHODS[method])
    suite = Suite(read_suite(tuning_suite(config, 0.5)))
    assert suite.directory == tmp_path / "run-tune"
    assert suite.entries["tuned"].grid == (0.005, 0.01, 0.02)
    trial = suite.run_config(RunKey("tuned", 0, 0.02))
    changed = {"name": trial.name, "output_dir": trial.output_dir}
    half = tiny_run(
        tmp_path / "run", "plan.total_tokens=2048", "optim.learning_rate=0.02", *METHODS[method]
    ).model_copy(update=changed)
    assert trial == half


def test_any_token_budget_is_shared(tiny_run: Configure, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "plan.total_tokens=null", "plan.tokens_per_parameter=0.5")
    suite = Suite(read_suite(tuning_suite(config, 0.25)))
    total = suite.plan(RunKey("tuned", 0, 0.01)).total_tokens
    assert abs(total - plan(config).total_tokens / 4) <= 2 * config.step_tokens  # whole steps of each stage


def test_a_learning_rate_for_each_stage_is_refused(tiny_run: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give one number to tune around"):
        tuning_suite(tiny_run(tmp_path, "optim.learning_rate=[1e-3,1e-4]"), 0.1)


def test_minutes_are_the_time_of_all_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = published_speeds("h200")
    monkeypatch.setattr(tune, "choose_speeds", lambda *_: speeds)
    config = load_config("llama_368m")
    suite = Suite(read_suite(tuning_suite(config, share_for(60, config))))
    trial = RunKey("tuned", 0, config.optim.learning_rate)
    times = stage_times(suite.run_config(trial), suite.plan(trial), speeds)
    assert times is not None
    assert 5 * sum(time.seconds for time in times) == pytest.approx(3600, rel=0.06)  # the share has two digits
    assert share_for(1e6, config) == 1.0


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ([], {"share": 0.1, "minutes": 5}, "give one"),
        (["distributed.world_size=8"], {"minutes": 5}, "give --share instead"),
    ],
)
def test_wrong_lengths_are_refused(overrides: list[str], arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_tune("llama_368m", overrides, **arguments)


def test_it_ends_with_the_command_of_the_best_rate(
    tiny_run: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(tiny_run(tmp_path / "run", "optim.learning_rate=0.3")))
    assert run_tune(str(file), ["method=vanilla", "plan.num_stages=1"], share=0.5) == 0
    record = load_suite(tmp_path / "run-tune")
    rate = record.entries[0].learning_rate
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"steplm train {file} method=vanilla plan.num_stages=1 optim.learning_rate={rate:g}"
    assert load_config(file, [last.split()[-1]]).optim.learning_rate == rate
