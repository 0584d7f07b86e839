"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from steplm.report.tables import Table

WIDEST_WORD = 20
TONES = {"better": "green", "worse": "red"}


def number_table(columns: Sequence[str], *, words: Sequence[str] = ("stage",), gap: int = 1) -> RichTable:
    """A dense table that never wraps, ``gap`` spaces between columns; all but those of words are right-aligned."""
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, gap, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    return table


def titled_table(title: str, left: Sequence[str], right: Sequence[str]) -> RichTable:
    """A table under its title: columns of words, then columns of numbers."""
    table = RichTable(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*left, *right):
        table.add_column(name, justify="left" if name in left else "right")
    return table


def print_table(console: Console, table: Table, *, titled: bool = False) -> None:
    """Print a table of a report, numbers right-aligned; narrow terminals wrap lines between words, not within."""
    shown = RichTable(box=None, header_style="bold", padding=(0, 2, 0, 0), title_justify="left")
    shown.title = table.title if titled else None
    for number, column in enumerate(table.columns):
        is_name = number == 0 or column == "text"
        longest = max(len(word) for row in table.rows for word in row[number].text.split())
        least = min(longest, WIDEST_WORD)
        shown.add_column(Text(column), justify="left" if is_name else "right", overflow="fold", min_width=least)
    for row in table.rows:
        styles = [TONES.get(cell.tone, "bold" if cell.strong else "") for cell in row]
        texts = [cell.text.replace(" [", "\n[") for cell in row]  # the interval below its number, to halve the width
        shown.add_row(*map(Text, texts, styles))
    console.print(shown)
    if table.caption:
        console.print(table.caption, style="dim", markup=False)
