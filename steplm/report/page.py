"""A self-contained HTML page for a suite, which works offline: tables, interactive charts, and what was run."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from steplm.report.charts import all_charts, facts
from steplm.report.curves import looks
from steplm.report.evaluations import Evaluation
from steplm.report.style import RUN_COLORS, RUN_COLORS_ON_DARK
from steplm.report.suite_figures import figure_name
from steplm.report.summary import Suite
from steplm.report.tables import (
    Cell,
    Table,
    details_table,
    problems,
    question_table,
    sources_table,
    stages_table,
    tuning_table,
)
from steplm.version import __version__

WITHOUT_PLOTLY = "For interactive charts: pip install plotly, and run steplm report again."
MOST_STAGE_TABLES = 6  # most entries for which stages are shown, on a page without a comparison
LONG_CELL = 18  # characters above which a cell of words may wrap


def write_page(suite: Suite, path: Path, figures: Mapping[str, Path], evaluations: Sequence[Evaluation] = ()) -> Path:
    """Write the page; it shows ``figures`` only if Plotly is not installed, but those of evaluations always."""
    plotly = plotly_script()
    look = looks(suite)
    charts = all_charts(suite, look)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(css_classes=_css_classes, data_uri=_data_uri)
    text = environment.from_string(_file("page.html")).render(
        suite=suite,
        facts=facts(suite),
        questions=[(q, suite.of(q), question_table(suite, q), details_table(suite, q)) for q in suite.record.questions],
        charts=charts,
        pictures={} if plotly else {c["id"]: figures[name] for c in charts if (name := figure_name(c)) in figures},
        has_chips=bool(plotly) or not figures,
        stage_tables=_stage_tables(suite),
        tuning=tuning_table(suite),
        problems=problems(suite),
        evaluations=evaluations,
        note="" if plotly else WITHOUT_PLOTLY,
        version=__version__,
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        plotly=Markup(plotly or ""),
        data=Markup(_embedded(_data(suite, look, charts) if plotly else {"charts": [], "labels": {}, "looks": {}})),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def plotly_script() -> str | None:
    """The JavaScript of the installed Plotly, or ``None`` if it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return get_plotlyjs()


def _file(name: str) -> str:
    return (files("steplm.report") / "page_files" / name).read_text(encoding="utf-8")


def _data(suite: Suite, look: Mapping[str, Any], charts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the script draws; it writes labels as HTML."""
    on_dark = dict(zip(RUN_COLORS, RUN_COLORS_ON_DARK, strict=True))
    return {
        "charts": [{key: value for key, value in chart.items() if key != "ends"} for chart in charts],
        "labels": {name: escape(entry.label) for name, entry in suite.entries.items()},
        "looks": {
            name: {"color": look.color and [look.color, on_dark[look.color]], "dash": look.dash}
            for name, look in look.items()
        },
    }


def _embedded(value: Any) -> str:
    """Encode as JSON that cannot close the script element around it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _stage_tables(suite: Suite) -> list[Table]:
    """The stages and sources of each run, if the suite compares nothing."""
    if suite.record.baseline is not None or len(suite.entries) > MOST_STAGE_TABLES:
        return []
    tables = [make(entry) for entry in suite.entries.values() for make in (stages_table, sources_table)]
    return [table for table in tables if table is not None]


def _css_classes(cell: Cell) -> str:
    has_long_words = len(cell.text) > LONG_CELL and any(character.isalpha() for character in cell.text)
    return " ".join(filter(None, ["strong" if cell.strong else "", cell.tone, "wrap" if has_long_words else ""]))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
