"""``steplm report``: tables, figures and one HTML page of a suite or of runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from steplm.report.evaluations import find_evaluations
from steplm.report.page import WITHOUT_PLOTLY, plotly_script, write_page
from steplm.report.suite_figures import write_figures
from steplm.report.summary import read_suite
from steplm.report.tables import problems, write_tables


def show_report(path: Path, output: Path | None) -> None:
    """Write the report of a suite directory, a run directory or a folder of runs; default folder: ``path / "report"``.

    Raises:
        SteplmError: there is neither a suite nor a run in ``path``, or what is there cannot be read.
    """
    console = Console(highlight=False)
    suite = read_suite(path)
    folder = output or path / "report"
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = find_evaluations(path)
    tables = write_tables(suite, folder, evaluations=[part.markdown(folder) for part in evaluations])
    figures = write_figures(suite, folder / "figures")
    page = write_page(suite, folder / "index.html", figures, evaluations)
    for line in problems(suite):
        console.print(line, markup=False, style="dim")
    console.print(f"tables   {', '.join(str(table) for table in tables)}", soft_wrap=True, markup=False)
    console.print(f"figures  {folder / 'figures'} ({len(figures)})", soft_wrap=True, markup=False)
    console.print(f"page     {page}", soft_wrap=True, markup=False)
    if plotly_script() is None:
        console.print(WITHOUT_PLOTLY, markup=False)
