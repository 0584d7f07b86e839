"""Fill the tables of docs/results.md and docs/comparing.md, between ``<!-- SOURCE: TITLE -->`` and ``<!-- / -->``.

    python benchmarks/results_tables.py

A source is a kept suite, such as ``results/cpu``, and the title that of one of its questions, or "Learning rates"; or
it is ``plans``, and the title a recipe, of which every method is planned.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from steplm.compare.methods import METHODS
from steplm.config import load_config
from steplm.planner.plan import plan
from steplm.report.runs import percent
from steplm.report.summary import Suite, read_suite
from steplm.report.tables import all_tables
from steplm.units import format_bytes

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/results.md", ROOT / "docs/comparing.md")
BLOCK = re.compile(r"<!-- (results/\w+|plans): (.+?) -->\n.*?<!-- / -->", re.DOTALL)

kept = cache(read_suite)


def table(suite: Suite, title: str) -> str:
    """The Markdown of one table, without its title, which the page has as a heading."""
    tables = {made.title: made for made in all_tables(suite)}
    return tables[title].markdown().partition("\n\n")[2].strip()


def plans(recipe: str) -> str:
    """The planned bytes of every method on the model of a recipe."""
    lines = ["| method | model state | | whole peak | |", "| --- | ---: | ---: | ---: | ---: |"]
    for method in METHODS.values():
        made = plan(load_config(recipe, [f"{key}={json.dumps(value)}" for key, value in method.settings.items()]))
        assert made.peak_bytes is not None
        assert made.vanilla_peak_bytes is not None
        state, peak = made.peak_model_state_bytes, made.peak_bytes
        saved = percent(-made.reduction) if made.reduction else ""
        saved_peak = percent(peak / made.vanilla_peak_bytes - 1) if peak != made.vanilla_peak_bytes else ""
        label = f"{method.label}, layers {'+'.join(map(str, made.layers))}" if len(made.layers) > 1 else method.label
        lines.append(f"| {label} | {format_bytes(state)} | {saved} | {format_bytes(peak)} | {saved_peak} |")
    return "\n".join(lines)


def block(source: str, title: str) -> str:
    """What stands between the markers."""
    return plans(title) if source == "plans" else table(kept(ROOT / source), title)


def filled(page: str) -> str:
    """The page with every table as the kept runs, or the planner, have it."""
    return BLOCK.sub(lambda match: f"<!-- {match[1]}: {match[2]} -->\n{block(match[1], match[2])}\n<!-- / -->", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
