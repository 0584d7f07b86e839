"""docs/scale.md and results/scale_table: their tables are the kept numbers, and those are the planner's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import scale_table

from steplm.cost.devices import DEVICES
from steplm.units import parse_bytes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
TABLE = json.loads((ROOT / "results/scale_table/table.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [scale_table.PAGE, scale_table.FULL], ids=["summary", "full"])
def test_the_tables_are_the_kept_numbers(path: Path) -> None:
    page, texts = path.read_text(encoding="utf-8"), scale_table.blocks(TABLE)[path]
    assert set(re.findall(r"<!-- (\w+) -->", page)) == set(texts)
    assert scale_table.filled(page, texts) == page, "run: python benchmarks/scale_table.py"


@pytest.mark.parametrize(
    ("rows", "model", "way", "world_size"), [("rows", "7B", "vanilla", 8), ("rows", "7B", "STEP, K=3", 64)]
)
def test_the_kept_numbers_are_the_planners(rows: str, model: str, way: str, world_size: int) -> None:
    kept = [r for r in TABLE[rows] if (r["model"], r["way"], r["world_size"]) == (model, way, world_size)]
    assert kept == [json.loads(json.dumps(scale_table.row_of(model, way, world_size)))], "make the tables anew"


def test_the_terms_of_every_row_add_up_to_its_peak() -> None:
    for row in (*TABLE["rows"], *TABLE["hybrid"]):
        assert sum(row["peak_terms"].values()) == row["peak_bytes"] > row["model_state_bytes"]
        assert row["least_seconds"] <= row["most_seconds"] <= 2 * row["least_seconds"]


def test_what_the_page_says_of_the_tables_is_so() -> None:
    by_key = {(row["model"], row["world_size"], row["way"]): row for row in TABLE["rows"]}
    for (model, world_size, way), row in by_key.items():
        if way == "vanilla":
            continue
        vanilla = by_key[model, world_size, "vanilla"]
        assert row["peak_bytes"] < vanilla["peak_bytes"]
        assert row["training_flops"] < vanilla["training_flops"]
        assert row["sent_bytes"] < vanilla["sent_bytes"]
        few, many = by_key[model, 8, way], by_key[model, 1024, way]
        assert few["model_state_bytes"] > many["model_state_bytes"] * 90
        assert many["model_state_bytes"] < many["peak_bytes"] / 20


def test_the_commands_of_the_page_are_made_of_what_there_is() -> None:
    assert set(re.findall(r"--device ([\w-]+)", PAGE)) <= set(DEVICES)
    assert all(parse_bytes(rate) for rate in re.findall(r"--bandwidth (\S+)`?", PAGE) if rate[0].isdigit())
