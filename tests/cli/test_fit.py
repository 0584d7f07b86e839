"""``steplm fit``: an answer first, in eighty columns, in numbers that a program can read."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steplm.cli.fit import render_fit, show_fit, what_fits
from steplm.config import load_config
from steplm.cost.seconds import published_speeds
from steplm.errors import ConfigError, OverBudget
from steplm.planner.fit import fit
from steplm.planner.plan import plan

GIB = 2**30
BUDGET = ("--budget", "16GiB")


def text_of(run: str, budget_gib: int, width: int = 80, overrides: tuple[str, ...] = (), **arguments: Any) -> str:
    stream = io.StringIO()
    config = load_config(run, overrides)
    result = fit(config, budget_gib * GIB, **arguments)
    render_fit(result, Console(file=stream, width=width), run, overrides, f"{budget_gib}GiB", 1)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("run", "budget_gib", "arguments"),
    [
        ("llama_368m", 8, {}),
        ("llama_1.2b", 16, {"vary": ["options"]}),
        ("llama_368m", 8, {"maximize": "batch", "vary": ["options"]}),
        ("llama_368m", 8, {"maximize": "sequence", "vary": ["options"]}),
        ("llama_1.2b", 8, {"maximize": "depth", "vary": ["options", "stages"]}),
    ],
)
def test_nothing_is_cut_off_on_eighty_columns(run: str, budget_gib: int, arguments: dict[str, Any]) -> None:
    text = text_of(run, budget_gib, **arguments)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_the_answer_comes_first_and_the_command_last() -> None:
    lines = text_of("llama_368m", 80).splitlines()
    assert lines[0].startswith("fits in 80.00 GiB (1.25 GiB reserve): as written")
    assert lines[-1] == "steplm train llama_368m --budget 80GiB"


def test_the_command_plans_what_the_table_shows() -> None:
    given = ("train.gradient_checkpointing=frozen", "data.train=[a b.txt]")
    text = text_of("llama_368m", 5, overrides=given, vary=["options"])
    command = shlex.split(text[text.index("steplm train") :].replace("\\\n", " "))
    assert command[:3] == ["steplm", "train", "llama_368m"]
    assert command[-2:] == ["--budget", "5GiB"]
    overrides = command[3:-2]
    keys = [override.partition("=")[0] for override in overrides]
    assert len(keys) == len(set(keys))
    assert "data.train=[a b.txt]" in overrides
    made = plan(load_config("llama_368m", [*overrides, "plan.budget=5GiB"]))
    best = fit(load_config("llama_368m", given), 5 * GIB, vary=["options"]).best
    assert made.peak_bytes == best.peak_bytes


def test_every_option_of_the_table_is_explained() -> None:
    text = text_of("llama_1.2b", 24, width=120, vary=["options"])
    assert "1 recompute frozen layers; time: one more forward pass of the frozen layers" in text
    assert "no master weights; quality: updates are rounded stochastically to bf16" in text
    assert "train.gradient_checkpointing=frozen" in text.splitlines()[0]


def test_a_budget_of_the_file_appears_once() -> None:
    text = text_of("llama_368m", 8, overrides=("plan.budget=80GiB",), vary=["options"])
    assert "plan.budget" not in text[text.index("steplm train") :]


def test_json_has_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    show_fit("llama_368m", budget="8GiB", maximize="batch", vary="options", as_json=True)
    values = json.loads(capsys.readouterr().out)
    best = values["alternatives"][0]
    assert values["budget_bytes"] == 8 * GIB
    made = plan(load_config("llama_368m", best["overrides"]))
    assert best["peak_bytes"] == made.peak_bytes
    assert best["model_state_bytes"] == made.peak_model_state_bytes
    assert best["layers"] == list(made.layers)
    assert f"train.per_device_train_batch_size={best['value']}" in best["overrides"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "8GiB", "vary": "stage,rank"}, "Did you mean 'stages'"),
        ({"budget": "8GiB", "maximize": "batches"}, "Did you mean 'batch'"),
        ({"budget": "8 gigs"}, "--budget: cannot read '8 gigs'"),
        ({"budget": "24"}, "--budget 24 is 24 bytes. With a unit"),
        ({"device": "rtx4091"}, "Did you mean 'rtx4090'"),
        ({}, r"give --budget, e\.g\. 24GiB, or a --device whose memory is known"),
    ],
)
def test_wrong_usage_is_told_what_was_meant(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        show_fit("llama_368m", **arguments)


def test_a_refused_plan_names_changes_that_fit() -> None:
    with pytest.raises(OverBudget) as caught:
        plan(load_config("llama_1.2b", ["plan.budget=16GiB"]))
    assert str(caught.value).endswith("`steplm fit` lists what would fit.")
    error = what_fits(caught.value, "llama_1.2b", ["plan.budget=16GiB"])
    first = str(error).splitlines()[2].partition("  (")[0].split()
    assert plan(load_config("llama_1.2b", [*first, "plan.budget=16GiB"])).peak_bytes
    assert error.peak_bytes == caught.value.peak_bytes


@pytest.mark.parametrize("arguments", [["plan", "llama_1.2b", "plan.budget=16GiB"], ["train", "llama_1.2b", *BUDGET]])
def test_plan_and_train_refuse_with_suggestions_before_anything_is_done(tmp_path: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-X", "importtime", "-m", "steplm", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 1
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
    assert "These fit, the cheapest first:" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_devices_memory_is_the_budget_and_its_time_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    show_fit("llama_368m", device="rtx4090", vary="options", as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["budget_bytes"] == 24 * 10**9
    assert all(row["seconds"] > 0 for row in values["alternatives"])


def test_the_first_command_is_the_answer_and_the_figure_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    show_fit("llama_1.2b", device="rtx4090", vary="options", output=tmp_path / "fit.svg")
    printed = capsys.readouterr()
    answer, _, rest = printed.out.partition("B parameters")
    first = rest[rest.index("steplm train") :].partition("#")[0]
    overrides = answer.partition(": with ")[2].split()[:-1]  # what follows is the number of parameters
    assert overrides
    assert set(overrides) <= set(first.split())
    assert printed.err == f"wrote {tmp_path / 'fit.svg'}\n"


def test_the_time_has_a_column_and_losses_their_scale() -> None:
    speeds = published_speeds("h200")
    # Too little host memory for the optimizer, so that stages are among the alternatives.
    text = text_of("llama_1.2b", 16, overrides=("plan.host_budget=4GiB",), vary=["options", "stages"], speeds=speeds)
    (head,) = [line for line in text.splitlines() if line.startswith("layers")][:1]
    assert head.split()[-1] == "time"
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "loss: +0.001 (11M, 500k tokens, two seeds)" in flat
    assert "stages with frozen layers; loss: +0.10" in flat
    assert "loss: −0.006 with Muon, 8-bit states, no master weights (0.66M, 15 tokens per parameter, one seed)" in flat


def test_several_devices_are_launched_by_torchrun_and_their_time_is_not_estimated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_fit("llama_368m", ["distributed.world_size=2"], budget="80GiB", vary="options", show=1)
    last = capsys.readouterr().out.splitlines()[-2:]
    assert " ".join(" ".join(last).split()).endswith(
        "torchrun --standalone --nproc-per-node 2 -m steplm train llama_368m \\ distributed.world_size=2 --budget 80GiB"
    )
    with pytest.raises(ConfigError, match="--device estimates the time of one device"):
        show_fit("llama_368m", ["distributed.world_size=2"], device="rtx4090")


def test_the_largest_value_has_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    show_fit("llama_368m", budget="8GiB", maximize="batch", vary="options", show=2)
    text = capsys.readouterr().out
    largest = re.search(r"largest batch in .*: ([\d,]+)", text)
    assert f"train.per_device_train_batch_size={largest[1].replace(',', '')} " in text
