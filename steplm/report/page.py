"""A self-contained HTML page for a suite, which works offline: tables, interactive charts, and what was run."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from steplm.report.charts import documents_chart, facts, question_charts, rates_chart
from steplm.report.curves import Look, looks
from steplm.report.evaluations import Evaluation
from steplm.report.style import RUN_COLORS, RUN_COLORS_ON_DARK
from steplm.report.suite import Question
from steplm.report.suite_figures import NAMES
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
AXIS_BUTTONS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}
MOST_STAGE_TABLES = 6  # most entries for which stages are shown, on a page without a comparison
LONG_CELL = 18  # characters above which a cell of words may wrap


def write_page(suite: Suite, path: Path, figures: Mapping[str, Path], evaluations: Sequence[Evaluation] = ()) -> Path:
    """Write the page; it shows ``figures`` only if Plotly is not installed, but those of evaluations always."""
    plotly = plotly_script()
    page = PageParts(suite, looks(suite), {} if plotly else figures)
    body = "\n".join([page.body(), *map(_evaluation, evaluations)])
    if not plotly:
        body += f'<p class="caption">{escape(WITHOUT_PLOTLY)}</p>'
    template = Template(_file("page.html"))
    text = template.substitute(
        title=escape(suite.record.name),
        css=_file("page.css"),
        body=body,
        version=__version__,
        data=_embedded(page.data() if plotly else {"charts": [], "labels": {}, "looks": {}}),
        plotly=f"<script>{plotly}</script>" if plotly else "",
        js=_file("page.js"),
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


def _embedded(value: Any) -> str:
    """Encode as JSON that cannot close the script element around it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


class PageParts:
    """The sections of one page and the charts that they reference."""

    def __init__(self, suite: Suite, look: dict[str, Look], pictures: Mapping[str, Path]) -> None:
        self.suite = suite
        self.look = look
        self.pictures = pictures
        self.charts: list[dict[str, Any]] = []

    def body(self) -> str:
        questions = self.suite.record.questions
        parts = [self._head()]
        parts += [self._question(question, number) for number, question in enumerate(questions, start=1)]
        parts += [self._stages(), self._tuning(), self._documents(), self._problems()]
        return "\n".join(part for part in parts if part)

    def data(self) -> dict[str, Any]:
        """Data for the script; call after ``body``, which collects the charts."""
        on_dark = dict(zip(RUN_COLORS, RUN_COLORS_ON_DARK, strict=True))
        return {
            "charts": self.charts,
            "labels": {name: escape(entry.label) for name, entry in self.suite.entries.items()},
            "looks": {
                name: {"color": look.color and [look.color, on_dark[look.color]], "dash": look.dash}
                for name, look in self.look.items()
            },
        }

    def _head(self) -> str:
        items = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in facts(self.suite))
        questions = self.suite.record.questions
        links = "".join(f'<li><a href="#q{i}">{escape(q.title)}</a></li>' for i, q in enumerate(questions, start=1))
        nav = f'<nav aria-label="Questions"><ol>{links}</ol></nav>' if len(questions) > 1 else ""
        return f'<header><h1>{escape(self.suite.record.name)}</h1><dl class="facts">{items}</dl>{nav}</header>'

    def _question(self, question: Question, number: int) -> str:
        section = f"q{number}"
        entries = self.suite.of(question)
        charts = {chart["kind"]: chart for chart in question_charts(self.suite, question, number, self.look)}
        text = f"<p>{escape(question.text)}</p>" if question.text else ""
        details = details_table(self.suite, question)
        further = f"<details><summary>Further numbers</summary>{table_html(details, titled=False)}</details>"
        has_results = any(entry.finished for entry in entries)
        return f"""<section id="{section}" aria-labelledby="{section}-title">
<h2 id="{section}-title">{escape(question.title)}</h2>{text}
{table_html(question_table(self.suite, question), titled=False)}
{self._chips([entry.entry.name for entry in entries]) if has_results and len(entries) > 1 else ""}
{self._chart(charts.get("loss"), section)}
{self._chart(charts.get("tradeoff"), section)}
<div class="pair">{self._chart(charts.get("memory"), section)}{self._chart(charts.get("growth"), section)}</div>
{further if has_results else ""}
</section>"""

    def _chips(self, names: list[str]) -> str:
        if self.pictures:
            return ""
        buttons = "".join(
            f'<button type="button" aria-pressed="true" data-entry="{escape(name)}">'
            f"{escape(self.suite.entries[name].label)}</button>"
            for name in names
        )
        return f'<div class="chips" role="group" aria-label="Methods shown in the charts">{buttons}</div>'

    def _chart(self, chart: dict[str, Any] | None, section: str) -> str:
        if chart is None:
            return ""
        self.charts.append({key: value for key, value in chart.items() if key != "ends"} | {"section": section})
        label = escape(f"{chart['title']}. {chart['about']} The numbers are in the tables.")
        name = NAMES[chart["kind"]]
        picture = self.pictures.get(f"{section}_{name}", self.pictures.get(name))
        inside = f'<img alt="{label}" src="{_data_uri(picture)}">' if picture else ""
        style = ' style="height:auto"' if picture else ""
        return f"""<figure>
<figcaption><h3>{escape(chart["title"])}</h3>{self._tabs(chart)}<p>{escape(chart["about"])}</p></figcaption>
<div class="chart" id="{chart["id"]}" role="img" aria-label="{label}"{style}>{inside}</div>
</figure>"""

    def _tabs(self, chart: dict[str, Any]) -> str:
        if "x_titles" not in chart or self.pictures:
            return ""
        radios = "".join(
            f'<label><input type="radio" name="{chart["id"]}-axis" value="{axis}" data-chart="{chart["id"]}"'
            f"{' checked' if axis == 'tokens' else ''}>{name}</label>"
            for axis, name in AXIS_BUTTONS.items()
        )
        log = f'<label><input type="checkbox" data-chart="{chart["id"]}">log</label>'
        return f'<fieldset class="tabs" aria-label="Horizontal axis and scale">{radios}{log}</fieldset>'

    def _stages(self) -> str:
        """The stages of each run, if the suite compares nothing."""
        if self.suite.record.baseline is not None or len(self.suite.entries) > MOST_STAGE_TABLES:
            return ""
        made = [make(entry) for entry in self.suite.entries.values() for make in (stages_table, sources_table)]
        tables = [table for table in made if table is not None]
        return f"<section><h2>Stages</h2>{''.join(map(table_html, tables))}</section>" if tables else ""

    def _tuning(self) -> str:
        table, chart = tuning_table(self.suite), rates_chart(self.suite)
        if table is None:
            return ""
        names = list(dict.fromkeys(trace["entry"] for trace in chart["traces"])) if chart else []
        return f"""<section id="rates-section"><h2>Learning rates</h2>
{table_html(table, titled=False)}{self._chips(names)}{self._chart(chart, "rates-section")}</section>"""

    def _documents(self) -> str:
        chart = documents_chart(self.suite)
        section = "documents-section"
        return f'<section id="{section}"><h2>Data</h2>{self._chart(chart, section)}</section>' if chart else ""

    def _problems(self) -> str:
        lines = "".join(f"<li>{escape(line)}</li>" for line in problems(self.suite))
        return f"<section><h2>Runs without a result</h2><ul>{lines}</ul></section>" if lines else ""


def _evaluation(evaluation: Evaluation) -> str:
    title = escape(evaluation.title)
    pictures = "".join(
        f'<figure><div class="chart" style="height:auto"><img alt="{title}. The numbers are in the tables." '
        f'src="{_data_uri(figure)}"></div></figure>'
        for figure in evaluation.figures
    )
    return f"<section><h2>{title}</h2>{''.join(map(table_html, evaluation.tables))}{pictures}</section>"


def table_html(table: Table, *, titled: bool = True) -> str:
    """A table with sortable columns in a box that scrolls horizontally; on a phone, each row is a block of lines.

    Args:
        titled: show the title; false if a heading just above says the same.
    """
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in table.columns)
    rows = "".join(
        f"<tr>{''.join(_cell_html(cell, name) for cell, name in zip(row, ('', *table.columns[1:]), strict=True))}</tr>"
        for row in table.rows
    )
    title, caption = escape(table.title), f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    heading = f"<h3>{title}</h3>" if titled else ""
    return f"""<div class="table">{heading}<div class="scroll" role="region" tabindex="0" aria-label="{title}">
<table aria-label="{title}"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{caption}</div>"""


def _cell_html(cell: Cell, column: str) -> str:
    """A cell labeled with its column; the first cell of a row names the row and has no label."""
    classes = " ".join(
        filter(None, ["strong" if cell.strong else "", cell.tone, "wrap" if _has_long_words(cell) else ""])
    )
    attributes = f' class="{classes}"' if classes else ""
    if cell.value is not None:
        attributes += f' data-value="{escape(str(cell.value))}"'
    if not column:
        return f'<th scope="row"{attributes}>{escape(cell.text)}</th>'
    return f'<td data-label="{escape(column)}"{attributes}>{escape(cell.text)}</td>'


def _has_long_words(cell: Cell) -> bool:
    return len(cell.text) > LONG_CELL and any(character.isalpha() for character in cell.text)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
