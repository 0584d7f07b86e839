"""Fill the tables of docs/results.md from the kept suites, between ``<!-- results/NAME: TITLE -->`` and ``<!-- / -->``.

    python benchmarks/results_tables.py

A title is that of a question of the suite, or "Learning rates".
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from steplm.report.summary import Suite, read_suite
from steplm.report.tables import all_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"
BLOCK = re.compile(r"<!-- (results/\w+): (.+?) -->\n.*?<!-- / -->", re.DOTALL)

kept = cache(read_suite)


def table(suite: Suite, title: str) -> str:
    """The Markdown of one table, without its title, which the page has as a heading."""
    tables = {made.title: made for made in all_tables(suite)}
    return tables[title].markdown().partition("\n\n")[2].strip()


def filled(page: str) -> str:
    """The page with every table as the kept runs have it."""
    return BLOCK.sub(
        lambda match: f"<!-- {match[1]}: {match[2]} -->\n{table(kept(ROOT / match[1]), match[2])}\n<!-- / -->", page
    )


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
