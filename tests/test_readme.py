"""What the README tells a stranger to type, typed."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import steplm
from steplm.config import RunConfig, dump_config, load_config, recipes_dir

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Appended to the README's training commands, so that they take seconds.
TINY = [
    "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=3", "model.num_attention_heads=2",
    "model.vocab_size=400", "pet.rank=2", "train.sequence_length=32", "plan.total_tokens=1024", "eval.max_tokens=512",
    "train.precision=fp32", "train.per_device_train_batch_size=4", "data.max_train_tokens=20k",
]  # fmt: skip


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    lines = [line for block in _blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("steplm ")]


def test_the_commands_of_the_readme_run(
    steplm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steplm.data import builtin

    documents = [f"Number {n} of some short documents.\n\n" + "A word or two more. " * 20 for n in range(300)]
    monkeypatch.setattr(builtin, "python_docs", lambda: tuple(documents))  # collecting the real ones takes long
    monkeypatch.setattr("steplm.data.sources.python_docs", lambda: tuple(documents))
    commands = _commands()
    assert {words[1] for words in commands} >= {"init", "plan", "prepare", "train", "generate", "eval"}
    for words in commands:
        tiny = TINY if words[1] in ("plan", "prepare", "train") and words[2] == "run.yaml" else []
        if words[1] == "quickstart":
            continue
        result = steplm(*words[1:], *tiny, cwd=tmp_path)
        assert result.returncode == 0, (words, result.stderr)


def test_the_python_of_the_readme_plans_and_trains(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = _blocks("python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama_368m.yaml").write_text(dump_config(tiny_run(tmp_path / "run")))
    text = block.replace('"llama_368m"', '"llama_368m.yaml"').replace(', "data.train=my_texts/*.jsonl.gz"', "")
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert names["result"].finished
    assert names["result"].export_dir.is_dir()


def test_the_plan_in_the_readme_is_the_one_that_is_printed() -> None:
    from steplm.cli.plan import render_plan
    from steplm.planner.plan import plan

    console = Console(width=80, file=io.StringIO(), color_system=None)
    config = load_config("llama_368m")
    render_plan(plan(config), console, config)
    printed = [line.rstrip() for line in console.file.getvalue().strip().splitlines()]  # type: ignore[attr-defined]
    assert "\n".join(["$ steplm plan llama_368m", *printed]) in README


def test_the_memory_of_the_first_table_is_the_planners() -> None:
    from steplm.planner.plan import plan
    from steplm.units import format_bytes

    lean = ["memory.optimizer_states=8bit", "memory.master_weights=false"]
    one_stage = ["method=vanilla", "plan.num_stages=1"]
    ways: list[list[str]] = [one_stage, [*one_stage, *lean], ["method=auto"], [], lean]
    table = README.split("<!-- first table -->")[1].split("<!-- /first table -->")[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[2:5]] for line in table.strip().splitlines()[2:]]
    for row, way in zip(rows, ways, strict=True):
        plain, recomputed = (
            plan(load_config("llama_368m", [*way, f"train.gradient_checkpointing={value}"]))
            for value in ("false", "true")
        )
        planned = (plain.peak_model_state_bytes, plain.peak_bytes, recomputed.peak_bytes)
        assert row == [format_bytes(num_bytes) for num_bytes in planned if num_bytes is not None]


def test_every_verb_and_recipe_is_in_the_readme() -> None:
    from steplm.cli.app import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert all(f"steplm {verb}" in README for verb in verbs)
    assert all(f"`{recipe.stem}`" in README for recipe in recipes_dir().glob("*.yaml"))


def test_links_and_pictures_of_the_readme_are_there() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_version_is_the_changelogs() -> None:
    assert f"## {steplm.__version__}" in (ROOT / "CHANGELOG.md").read_text()
