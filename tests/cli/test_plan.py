"""``steplm plan``: quick, without torch, in numbers that add up."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steplm.cli.plan import plan_to_json, render_explain, render_plan, show_plan
from steplm.config import load_config, recipes_dir
from steplm.errors import ConfigError
from steplm.planner.plan import Plan, plan
from steplm.types import from_json

LLAMA_368M = {
    "model": {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24, "num_attention_heads": 16},
    "plan": {"num_stages": 3, "objective": "model_state"},
}


def make_plan(*overrides: str, values: dict[str, Any] = LLAMA_368M) -> Plan:
    return plan(load_config(values, overrides))


def text_of(render: Any, *overrides: str, width: int = 80) -> str:
    stream = io.StringIO()
    config = load_config(LLAMA_368M, overrides)
    render(plan(config), Console(file=stream, width=width), config)
    return stream.getvalue()


def test_json_has_the_numbers_that_programs_ask_for() -> None:
    made = make_plan()
    values = json.loads(json.dumps(plan_to_json(made)))
    assert [stage["num_new_layers"] for stage in values["stages"]] == [11, 8, 5]
    assert [stage["num_hidden_layers"] for stage in values["stages"]] == [11, 19, 24]
    assert values["peak_model_state_bytes"] == max(stage["model_state_bytes"] for stage in values["stages"])
    assert values["vanilla_model_state_bytes"] == 5_887_508_480
    assert values["reduction"] == pytest.approx(0.4263, abs=1e-4)
    for stage in values["stages"]:
        assert stage["model_state_bytes"] == sum(term["num_bytes"] for term in stage["terms"])
    assert from_json(Plan, values["plan"]) == made


def test_json_parameters_of_every_stage_add_up_to_its_model() -> None:
    made = make_plan()
    for stage, values in zip(made.stages, plan_to_json(made)["stages"], strict=True):
        depth = stage.num_hidden_layers
        assert values["trained_parameters"] + values["frozen_parameters"] == made.shape.num_parameters(depth)
        (phase,) = stage.phases
        assert values["adapter_parameters"] == len(phase.adapters) * 2_492_416


def test_table_of_the_368m_plan() -> None:
    assert text_of(render_plan).splitlines() == EXPECTED_TABLE.splitlines()


EXPECTED_TABLE = """\
llama, 368M params, 24 layers in 3 stages, bf16, 7.36B tokens; memory in GiB
micro-batches of 8 × 1024 tokens, 1 a step; loss in chunks of 512 rows
stage    layers trained frozen adapters tokens weights grads optim state  peak
──────────────────────────────────────────────────────────────────────────────
1            11    204M                   1.5B    0.38  0.38  2.28  3.04  6.86
2          11+8    166M   139M    27.4M  2.59B    0.62  0.36  2.17  3.15  9.63
3 ◀        19+5    129M   239M    47.4M  3.27B    0.77  0.33  1.97  3.07 11.22
                                                                              \n\
emb+head          65.5M                           0.12  0.12  0.73  0.98      
vanilla      24    368M                           0.69  0.69  4.11  5.48 13.61
peak  11.22 GiB in stage 3 (loss); vanilla 13.61 GiB; −17.6%
state 3.15 GiB in stage 2; vanilla 5.48 GiB; −42.6%
device needed, with memory.reserve=1.25 GiB: 12.47 GiB
emb+head: embeddings, final norm and head, included in every stage
◀: the highest peak
"""


@pytest.mark.parametrize(
    "overrides",
    [
        ["plan.num_stages=1"],
        ["plan.num_stages=4"],
        ["plan.count_embeddings=false"],
        ["plan.train_embeddings=first_stage"],
        ["method=growth"],
        ["plan.layers=[12,6,6]"],
        ["model.hidden_size=32", "pet.rank=2", "model.vocab_size=20"],
        ["model.hidden_size=8192", "model.intermediate_size=28672", "model.num_hidden_layers=80"],
    ],
)
def test_no_number_is_cut_off_on_eighty_columns(overrides: list[str]) -> None:
    for render in (render_plan, render_explain):
        text = text_of(render, *overrides)
        assert "…" not in text
        assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("recipe", sorted(path.stem for path in recipes_dir().glob("*.yaml")))
@pytest.mark.parametrize("overrides", [["method=auto"], ["method=step", "plan.num_stages=3"]])
def test_plans_of_the_recipes_fit_eighty_columns(
    recipe: str, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    world_size = 8 if overrides == ["method=auto"] else None
    show_plan(recipe, overrides, world_size=world_size)
    text = capsys.readouterr().out
    assert re.match(r".*; memory in [KMG]iB\n", text)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_budget_that_ordinary_training_would_exceed_refuses_no_table_of_what_fits() -> None:
    fits = plan(load_config("llama_368m", ["plan.budget=13GiB"]))
    assert fits.vanilla_peak_bytes > 13 * 2**30
    assert "vanilla" in text_of(render_plan, "plan.budget=13GiB")


def test_embeddings_frozen_after_stage_one_have_their_own_row_in_every_stage() -> None:
    text = text_of(render_plan, "plan.train_embeddings=first_stage")
    assert sum(line.startswith(" emb+head") for line in text.splitlines()) == 3


def test_a_plan_by_hand_is_told_that_less_is_possible() -> None:
    assert "smaller peak is possible" in text_of(render_plan, "plan.layers=[12,6,6]")
    assert "smaller peak is possible" not in text_of(render_plan, "plan.layers=[11,8,5]")


def test_explain_shows_every_term_and_the_sums() -> None:
    made = make_plan()
    text = text_of(render_explain, width=110)
    for stage in made.stages:
        assert f"{stage.memory.total_bytes:,}" in text
        for term in (*stage.memory.terms, *stage.peak.highest.memory.terms):
            assert term.formula in text
            assert f"{term.num_bytes:,}" in text
        for instant in stage.peak.instants:
            assert f"{instant.memory.total_bytes:,}" in text
    assert "stage 2: n_i = 8, N_{i-1} = 11, E = 2,492,416" in text
    assert "5,887,508,480 bytes" in text


def test_show_plan_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan("llama_368m", ["plan.num_stages=2", "plan.objective=model_state"], as_json=True)
    assert [stage["num_new_layers"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [14, 10]


def test_a_family_that_is_not_written_down_is_planned_from_the_model_and_has_no_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["model.hidden_size=64", "model.intermediate_size=96", "pet.rank=4", "model.vocab_size=100"]
    show_plan("llama_368m", ["model.model_type=starcoder2", *small], as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["model_type"] == "starcoder2"
    assert sum(stage["num_new_layers"] for stage in values["stages"]) == 24
    with pytest.raises(ConfigError, match="operations of model type 'starcoder2' are not known by formula"):
        show_plan("llama_368m", ["model.model_type=starcoder2", *small], device="h200", as_json=True)


IMPORTED = """
import sys
from steplm.cli.plan import show_plan
show_plan("llama_1.2b")
print(sorted({"torch", "transformers", "datasets", "scipy", "numpy"} & set(sys.modules)))
"""


def test_planning_loads_no_torch() -> None:
    """What makes it quick."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("max_train_tokens", "words"), [("1B", "7.4 epochs over data.max_train_tokens=1B"), ("8B", "")]
)
def test_text_that_is_repeated_is_said_so(
    max_train_tokens: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_plan("llama_368m", [f"data.max_train_tokens={max_train_tokens}"])
    output = capsys.readouterr().out
    assert (words in output) if words else ("epochs" not in output)


def test_no_llama_recipe_repeats_its_text() -> None:
    for name in ("llama_368m", "llama_680m", "llama_1.2b"):
        config = load_config(name)
        assert plan(config).total_tokens <= config.data.max_train_tokens


def test_the_time_of_a_device_adds_up_by_stage_and_term(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan("llama_368m", device="h200", price=2.5, as_json=True)
    time = json.loads(capsys.readouterr().out)["time"]
    made = plan(load_config("llama_368m"))
    assert time["device"] == "h200"
    assert time["seconds"] == pytest.approx(sum(stage["seconds"] for stage in time["stages"]))
    assert time["cost"] == pytest.approx(time["seconds"] / 3600 * 2.5)
    for stage, planned in zip(time["stages"], made.stages, strict=True):
        assert stage["num_steps"] * 256 * 1024 == planned.tokens
        assert stage["seconds"] == pytest.approx(stage["num_steps"] * stage["step_seconds"])
        assert stage["tokens_per_second"] == pytest.approx(planned.tokens / stage["seconds"])
        assert stage["terms"]
        assert not stage["waits_for_launches"]
        computed = [term["seconds"] for term in stage["terms"] if term["kind"] != "launches"]
        assert stage["step_seconds"] == pytest.approx(sum(computed), rel=1e-3)  # launches take place beside it


def test_vanilla_beside_the_time_is_the_plan_of_one_stage(capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for overrides in ([], ["plan.num_stages=1", "method=vanilla"]):
        show_plan("llama_368m", overrides, device="a100-80gb", as_json=True)
        times.append(json.loads(capsys.readouterr().out)["time"])
    assert times[1]["seconds"] == pytest.approx(times[1]["vanilla_seconds"])
    assert times[0]["vanilla_seconds"] == pytest.approx(times[1]["seconds"], rel=1e-3)  # but for rounding to steps


def test_the_plan_tells_from_how_many_micro_batches_updates_in_host_memory_cost_little(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for accumulated in (1, 10_000):
        overrides = ["memory.offload_optimizer=true", f"train.gradient_accumulation_steps={accumulated}"]
        show_plan("llama_1.2b", ["method=vanilla", "plan.num_stages=1", *overrides], device="rtx4090")
        found = re.search(r"at most 10% of it from ([\d,]+) micro-batches \(now (\d+)\)", capsys.readouterr().out)
        least, now = (int(number.replace(",", "")) for number in found.groups())
        assert now == accumulated
        assert (least <= now) is (accumulated == 10_000)


def test_the_time_and_its_terms_fit_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_plan("llama_1.2b", device="rtx4090", price=0.4, explain=True)
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert "time on rtx4090, in steps of" in flat
    assert "GiB with the reserve does not fit in its 24 GB" in flat
    assert "not measured on this device" in flat
    assert "6 N V d" in flat
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "h20"}, "--device has no 'h20'. Did you mean 'h200'?"),
        ({"price": 2.5}, "--price is for an hour of a device: add --device"),
        (
            {"device": "h200", "calibrate": True},
            "--calibrate times this machine, which is not h200: take --device here.",
        ),
        ({"device": "here", "world_size": 8}, "--device here times one device, and this run has 8."),
        ({"device": "h10", "world_size": 8}, "--device has no 'h10'. Did you mean 'h100'"),
        ({"device": "rtx4090", "world_size": 16}, "the network of rtx4090 is not known: give the bytes per second"),
        ({"bandwidth": "25GB"}, "--utilization and --bandwidth are for several devices: add --world-size."),
        ({"utilization": 0.5}, "--utilization and --bandwidth are for several devices: add --world-size."),
        ({"bandwidth": "foo", "world_size": 8}, "--bandwidth: cannot read 'foo'"),
        ({"utilization": 0.0, "world_size": 8}, "--utilization=0 is a share of the peak: give a number above 0"),
        ({"utilization": 40, "world_size": 8}, "--utilization=40 is a share of the peak"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_before_anything_is_printed(
    arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        show_plan("llama_368m", **arguments)
    assert str(error.value).startswith(message)
    assert capsys.readouterr().out == ""


def test_the_time_in_the_page_is_the_one_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_plan("llama_368m", device="h200", price=2.5)
    text = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    page = (Path(__file__).parents[2] / "docs/speed.md").read_text(encoding="utf-8")
    assert text[text.index("time on h200") :].strip() in page
