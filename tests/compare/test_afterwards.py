"""What a suite ends in: tasks, tuning and MT-Bench of its models by one command; refused early, done once."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from steplm.cli.afterwards import run_parts
from steplm.cli.app import mtbench
from steplm.compare.display import SuiteDisplay
from steplm.compare.entries import Suite
from steplm.compare.suite import AfterwardsConfig, MtBenchConfig, read_suite
from steplm.report.suite import RunEntry, SuiteRecord, load_suite

for library in ("lm_eval", "trl", "openai"):
    pytest.importorskip(library)

Values = Callable[..., dict[str, Any]]
PROMPTS = {
    "single-v1": "{answer}",
    "single-v1-multi-turn": "{answer_1} {answer_2}",
    "pair-v2": "Assistant A's {answer_a} Assistant B's {answer_b}",
    "pair-v2-multi-turn": "Assistant A's {answer_a_1} {answer_a_2} Assistant B's {answer_b_1} {answer_b_2}",
}
TUNED = {
    "entries": [
        {"name": "step_2", "method": "step", "learning_rates": [1e-3, 1e-2], "tune": True},
        {"name": "vanilla", "method": "vanilla"},
    ],
    "jobs": 2,
}


def _write_rows(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """``zero_shot/``, ``instructions.json`` and ``bench/``, each of a few lines."""
    items = [{"query": f"Question: {word}?", "choices": ["new layers", "the model"], "gold": 0} for word in "abc"]
    _write_rows(tmp_path / "zero_shot/piqa.jsonl", *items)
    records = [{"instruction": f"Say {number}.", "output": f"the model {number}"} for number in range(12)]
    (tmp_path / "instructions.json").write_text(json.dumps(records))
    _write_rows(
        tmp_path / "bench/question.jsonl", {"question_id": 1, "category": "writing", "turns": ["Grow.", "Shrink."]}
    )
    _write_rows(
        tmp_path / "bench/judge_prompts.jsonl",
        *(
            {"name": name, "system_prompt": "Say [[A]]." * name.startswith("pair"), "prompt_template": template}
            for name, template in PROMPTS.items()
        ),
    )
    return tmp_path


def _afterwards(url: str, **keys: Any) -> dict[str, Any]:
    sft = {"data": "instructions.json", "max_steps": 2, "per_device_train_batch_size": 2, "precision": "fp32"}
    bench = {"data": "bench", "judge_model": "stub", "base_url": url, "max_new_tokens": 4, "backoff": 0.01}
    return {
        "tasks": {"names": ["piqa"], "data": "zero_shot", "limit": 2},
        "sft": {**sft, "validation_fraction": 0.2},
        "mtbench": {**bench, "mode": "both"},
        **keys,
    }


@pytest.fixture
def compare(suite_values: Values, steplm: Callable[..., Any], sets: Path) -> Callable[..., Any]:
    """``compare(afterwards, *arguments, **keys)``: the command on the tiny suite."""

    def run(afterwards: dict[str, Any], *arguments: object, **keys: Any) -> Any:
        values = suite_values(sets / "suite", afterwards=afterwards, **keys)
        values["run"]["model"]["max_position_embeddings"] = 512
        (sets / "tiny.yaml").write_text(yaml.safe_dump(values))
        return steplm("compare", "tiny.yaml", *arguments, cwd=sets)

    return run


def test_a_suite_ends_in_tasks_tuned_models_and_a_judge_and_its_report_shows_them(
    compare: Callable[..., Any], stub_judge: Callable[..., Any], sets: Path
) -> None:
    judge = stub_judge(["400"])  # one reply is missing
    suite = sets / "suite"
    afterwards = _afterwards(judge.url)
    shown = compare(afterwards, "--no-report", "log.progress=lines", **TUNED)
    assert shown.returncode == 1
    assert "1 request got no reply" in shown.stderr
    assert "piqa, acc" in shown.stdout
    assert "step_2: done  2 steps" in shown.stdout
    assert len(judge.requests) == 8  # 2 models x 2 turns, and 2 turns x 2 orders

    again = compare(afterwards, "log.progress=lines", **TUNED)
    assert again.returncode == 0, again.stderr
    assert len(judge.requests) == 9, "what has its reply is not asked again"
    assert "as saved" in again.stderr
    assert "step_2: " in again.stdout
    assert "is finished already" in again.stdout

    record = load_suite(suite)
    chosen = {entry.name: record.runs_of(entry.name)[0].dir for entry in record.entries}
    tuned = sorted(str(path.relative_to(suite)) for path in suite.glob("runs/*/*/sft/export"))
    assert tuned == sorted(f"{run}/sft/export" for run in chosen.values()), "of each entry its chosen rate"
    assert not list(suite.rglob("checkpoints"))
    made_of = json.loads((suite / "mt_bench/scores.json").read_text())["models"]
    assert made_of == {name: str(suite / run / "sft/export") for name, run in chosen.items()}
    scored = json.loads((suite / "evaluation/zero_shot.json").read_text())
    assert [model["label"] for model in scored["models"]] == ["vanilla", "step_2"]
    assert scored["limit"] == 2

    tables = (suite / "report/tables.md").read_text()
    page = (suite / "report/index.html").read_text()
    for title in ("Zero-shot tasks", "Instruction tuning", "MT-Bench"):
        assert f"## {title}\n" in tables
        assert f"<h2>{title}</h2>" in page
    assert "| model | steps | train loss | held-out loss before | held-out loss |" in tables

    (suite / "report/index.html").unlink()
    changed = compare({**afterwards, "sft": {**afterwards["sft"], "max_steps": 3}}, **TUNED)
    assert changed.returncode == 1
    assert "max_steps: 2 there, 3 now" in changed.stderr
    assert (suite / "report/index.html").is_file(), "a step that fails takes no result away"


def test_a_model_whose_run_is_not_finished_is_left_out_and_told(
    suite_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = suite_values(tmp_path, afterwards=_afterwards("http://127.0.0.1:9/v1"))
    suite = Suite(read_suite(values))
    entries = tuple(replace(entry.record, learning_rate=1e-2) for entry in suite.entries.values())
    record = SuiteRecord("tiny", "tokens", (0,), entries, (RunEntry("vanilla", 0, 1e-2, "runs/v", "failed"),))
    assert run_parts(suite, record, SuiteDisplay(Console())) == 1
    shown = capsys.readouterr().out
    assert [f"{name} has no finished run and is left out" in shown for name in suite.entries] == [True, True]


def test_a_dry_run_lists_the_steps_and_does_none(compare: Callable[..., Any], sets: Path) -> None:
    afterwards = _afterwards("http://127.0.0.1:9/v1", entries="step_2")
    shown = compare(afterwards, "--dry-run", seeds=[3, 4])
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.endswith(
        "then, of step_2 (seed 3):\n"
        "  zero-shot tasks: piqa, the first 2 items of each\n"
        "  instruction tuning: instructions.json; all parameters\n"
        "  MT-Bench of the tuned models: both, judged by stub\n"
    )
    assert not (sets / "suite").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tasks": {"names": ["piqa"], "data": "gone"}}, "no folder gone of evaluation sets"),
        ({"tasks": {"names": ["winogrande"], "data": "zero_shot"}}, "winogrande.jsonl"),
        ({"sft": {"data": "gone.json"}}, "gone.json"),
        ({"sft": {"data": "instructions.json", "chat_template": "gone.jinja"}}, "chat_template: no file gone.jinja"),
        ({"sft": {"data": "instructions.json", "sequence_length": 513}}, "more than the model's 512 positions"),
        ({"mtbench": {"data": "gone", "judge_model": "j"}}, "no folder gone"),
        ({"mtbench": {"data": "bench", "judge_model": "j", "categories": "math"}}, "no question is of category 'math'"),
        ({"mtbench": {"data": "bench", "judge_model": "j"}}, "no key for the judge at https://api.openai.com/v1"),
        ({"entries": "vanilla"}, "a pairwise comparison needs two models or more"),
    ],
)
def test_what_cannot_be_done_afterwards_is_refused_before_the_first_run(
    compare: Callable[..., Any], sets: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], words: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    shown = compare(_afterwards("http://127.0.0.1:9/v1", **keys))
    assert shown.returncode in (1, 2)
    assert words in shown.stderr
    assert not (sets / "suite/runs").exists()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("lm_eval.models.huggingface", "pip install '.[eval]'"),
        ("trl", "pip install '.[sft]'"),
        ("openai", "pip install '.[mtbench]'"),
    ],
)
def test_a_missing_extra_is_told_before_the_first_run(
    compare: Callable[..., Any], sets: Path, monkeypatch: pytest.MonkeyPatch, module: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    shown = compare(_afterwards("http://127.0.0.1:9/v1"))
    assert shown.returncode == 2
    assert words in shown.stderr
    assert not (sets / "suite/runs").exists()


def test_the_section_has_the_options_of_the_command_with_its_defaults() -> None:
    options = inspect.signature(mtbench).parameters
    of_the_suite = {"models", "name", "answers", "output", "device", "dry_run", "json"}
    assert set(options) - of_the_suite == set(MtBenchConfig.model_fields)
    for name, field in MtBenchConfig.model_fields.items():
        expected = None if field.default == [] else field.default
        assert options[name].default == (inspect.Parameter.empty if field.is_required() else expected)


@pytest.mark.parametrize(("file", "mark"), [("docs/comparing.md", ""), ("recipes/suites/gpu.yaml", "# ")])
def test_a_section_that_is_shown_is_one(file: str, mark: str) -> None:
    lines = iter((Path(__file__).parents[2] / file).read_text().splitlines())
    begin = next(line for line in lines if line.startswith(f"{mark}afterwards:"))
    shown = [begin, *takewhile(lambda line: line.startswith(f"{mark}  "), lines)]
    values = yaml.safe_load("\n".join(line.removeprefix(mark) for line in shown))
    config = AfterwardsConfig.model_validate(values["afterwards"])
    assert None not in (config.tasks, config.sft, config.mtbench)
