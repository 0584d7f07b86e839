"""Console output of a suite: log lines, and on a terminal a live table below them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from steplm.compare.tuning import Choice
from steplm.planner.plan import Plan
from steplm.report.documents import Summary, read_document
from steplm.report.suite import RunEntry
from steplm.units import format_count, format_seconds

LINE_EVERY_SECONDS = 60.0

# An active run: its directory, its latest training event, its plan.
Row = tuple[str, dict[str, Any] | None, Plan]


class SuiteDisplay:
    """Prints events as they happen, and overall progress once a minute or, if ``live``, in a table below the events."""

    def __init__(self, console: Console, *, live: bool = False) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if live else None
        self._last_line_at = time.monotonic()

    def __enter__(self) -> SuiteDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False)

    def waiting_for_runs(self) -> None:
        self.note("waiting for the runs of a suite that was killed: they save and stop", "dim")

    def ended(self, run: RunEntry, directory: Path) -> None:
        if run.status == "waiting":
            self.note(f"stopped   {run.dir}", "dim")
            return
        style = {"finished": "green", "diverged": "yellow", "failed": "red"}[run.status]
        result = _result(directory / run.dir) if run.status == "finished" else run.error or ""
        log = f"  (log: {directory / run.dir / 'log.txt'})" if run.status == "failed" else ""
        self.note(f"{run.status:<9} {run.dir}  {result}{log}", style)

    def chosen(self, entry: str, losses: Mapping[float, float | None], choice: Choice | None) -> None:
        tried = ", ".join(f"{rate:g}: {'diverged' if x is None else f'{x:.4f}'}" for rate, x in losses.items())
        if choice is None:
            self.note(f"tuning    {entry}: every run diverged ({tried})", "red")
            return
        edge = ", at the edge of the grid" if choice.at_edge else ""
        self.note(f"tuning    {entry}: learning rate {choice.learning_rate:g}{edge} ({tried})", "bold")

    def update(self, runs: Sequence[RunEntry], num_expected: int, rows: Sequence[Row], left: float | None) -> None:
        """Called several times a second."""
        status = _status(runs, num_expected, left)
        if self._live is not None:
            table = Table(title=status, title_justify="left", box=None, show_header=False)
            table.add_column(overflow="fold")
            for _ in range(4):
                table.add_column(justify="right", no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, _cells(row)))
            self._live.update(table)
        elif time.monotonic() - self._last_line_at >= LINE_EVERY_SECONDS:
            self._last_line_at = time.monotonic()
            self.note("  ".join([status, *(" ".join(_cells(row)) for row in rows)]))


def make_display(kind: str) -> SuiteDisplay:
    """Create a display: ``rich``, ``lines``, ``none``, or ``auto`` (rich on a terminal, else lines)."""
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "lines"
    console = Console(quiet=kind == "none", soft_wrap=kind == "lines", highlight=False)
    return SuiteDisplay(console, live=kind == "rich")


def _status(runs: Sequence[RunEntry], num_expected: int, left: float | None) -> str:
    counts = {status: sum(run.status == status for run in runs) for status in ("finished", "diverged", "failed")}
    others = "".join(f", {count} {status}" for status, count in counts.items() if count and status != "finished")
    time_left = "" if left is None else f", left {format_seconds(left)}"
    return f"{counts['finished']}/{num_expected} runs finished{others}{time_left}"


def _cells(row: Row) -> list[str]:
    run, event, plan = row
    if event is None:
        return [run, "starting", "", "", ""]
    return [
        run,
        f"stage {event['stage']}/{plan.num_stages} step {event['step']:,}/{event['num_steps']:,}",
        f"{event['tokens_seen'] / plan.total_tokens:.0%}",
        f"loss {event['loss']:.3f}",
        f"{format_count(event['tokens_per_second'])} tok/s",
    ]


def _result(run_dir: Path) -> str:
    summary = read_document(Summary, run_dir / "summary.json")
    assert summary is not None  # the run has finished
    return (
        f"validation loss {summary['validation_loss']:.4f}, perplexity {summary['validation_perplexity']:.2f}, "
        f"{format_seconds(summary['elapsed_seconds'])}"
    )
