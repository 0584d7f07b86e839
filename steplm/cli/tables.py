"""Print the tables of reports on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from steplm.report.tables import Table

WIDEST_WORD = 20
TONES = {"better": "green", "worse": "red"}


def print_table(console: Console, table: Table, *, titled: bool = False) -> None:
    """Print names left-aligned and numbers right-aligned; narrow terminals wrap lines between words, not within."""
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
