"""What the pages of docs say, checked: tables against planner and kept runs, commands by running them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_table
import pytest
import results_tables

from steplm.config import RunConfig, config_keys, dump_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
RESULTS = ROOT / "results/memory_table"


@pytest.mark.parametrize("name", ["results.md", "comparing.md", "update_rules.md"])
def test_the_tables_of_a_page_are_made_of_plans_and_kept_runs(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    made = results_tables.filled(page)
    assert "<!-- / -->" in page
    assert made == page, "run: python benchmarks/results_tables.py"


def _kept(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def test_the_memory_tables_are_the_kept_numbers() -> None:
    for path, blocks in memory_table.blocks(_kept("table.json"), _kept("simulated.json")).items():
        page = (ROOT / path).read_text(encoding="utf-8")
        for marker, text in blocks.items():
            assert f"<!-- {marker} -->\n{text}\n<!-- /{marker} -->" in page, "run: python benchmarks/memory_table.py"


@pytest.mark.parametrize("model", ["368M", "1.2B"])
def test_the_kept_numbers_are_the_planners(model: str) -> None:
    table = _kept("table.json")
    for key, made in {
        "rows": memory_table.planned_rows(model, memory_table.WAYS),
        "paper": list(memory_table.paper_rows(model)),
    }.items():
        kept = [row for row in table[key] if row["model"] == model]
        assert json.loads(json.dumps(made)) == kept, "run: python benchmarks/memory_table.py"


def test_the_simulated_stages_are_those_of_the_table() -> None:
    planned = {(row["model"], row["way"]): row for row in _kept("table.json")["rows"]}
    rows = _kept("simulated.json")["rows"]
    assert {row["model"] for row in rows} == {"368M", "1.2B"}
    for row in rows:
        assert row["planned_bytes"] == planned[row["model"], row["way"]]["peak_bytes"]
        assert row["simulated_bytes"] == pytest.approx(row["planned_bytes"], rel=0.03)


def test_the_commands_of_the_page_run(
    steplm: Callable[..., Any], tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(tiny_run(tmp_path / "run")))
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {word for words in commands for word in words} >= {"plan", "fit", "--explain", "--simulate", "--calibrate"}
    for words in commands:
        if "--simulate" in words:  # a large model takes a minute
            words = ["run.yaml" if word == "llama_368m" else word for word in words]
        result = steplm(*words[1:], cwd=tmp_path)
        assert result.returncode == 0, (words, result.stderr)


def test_the_page_knows_every_memory_key_and_no_other_key() -> None:
    keys = config_keys()
    sections = {key.partition(".")[0] for key in keys}
    named = set(re.findall(r"[`*]([a-z]+\.[a-z_]+)", PAGE))
    assert {key for key in named if key.partition(".")[0] in sections} <= set(keys)
    assert {key for key in keys if key.startswith("memory.")} <= named


def test_links_of_the_page_are_there() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    assert targets
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []
