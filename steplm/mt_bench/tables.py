"""The scores as Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steplm.files import write_atomically
from steplm.mt_bench.scores import ALL, CONFIDENCE, TURNS, Score, Scores, Where
from steplm.report.runs import NOT_YET
from steplm.report.tables import Cell, Table, write_csv

TURN_NAMES = {None: "both turns", 1: "turn 1", 2: "turn 2"}
_TURN_COLUMNS = tuple(TURN_NAMES[turn] for turn in TURNS)
_CAPTION = (
    f"In brackets: {CONFIDENCE:.0%} interval, bootstrap over questions. "
    "Judged: the number of judgments in a row; missing ones are not filled in."
)


def all_tables(scores: Scores, judge: str) -> list[Table]:
    """One table of all models, then one per model by category, then one per pair of models."""
    singles = scores.of("score")
    tables = []
    if len(singles) > 1:
        rows = [_single_row(name, ALL, found) for (name,), found in singles.items()]
        tables.append(_single_table(f"MT-Bench, single answers, judged by {judge}", "model", rows))
    for (name,), found in singles.items():
        rows = [_single_row(category, category, found) for category in _categories(found)]
        tables.append(_single_table(f"{name}, single answers, judged by {judge}", "category", rows))
    tables += [_difference_table(one, two, found) for (one, two), found in scores.of("score_difference").items()]
    tables += [_pair_table(one, two, judge, found) for (one, two), found in scores.of("win_share").items()]
    return tables


def _categories(found: Mapping[Where, Score]) -> list[str]:
    return list(dict.fromkeys(category for category, _ in found))


def _single_table(title: str, first: str, rows: Sequence[tuple[Cell, ...]]) -> Table:
    caption = f"Score 1 to 10, mean over answers. {_CAPTION}"
    if any(row[-1].value for row in rows):
        caption += " Unparsable: replies without a score, however often asked; in no mean."
    return Table(title, (first, *_TURN_COLUMNS, "judged", "unparsable"), tuple(rows), caption)


def _single_row(name: str, category: str, found: Mapping[Where, Score]) -> tuple[Cell, ...]:
    both = found[category, None]
    means = [_mean_cell(found[category, turn]) for turn in TURNS]
    return (_name_cell(name), *means, _judged_cell(both), Cell(f"{both.unparsable}", both.unparsable))


def _difference_table(one: str, two: str, found: Mapping[Where, Score]) -> Table:
    rows = tuple(
        (
            _name_cell(category),
            *(_mean_cell(found[category, turn], signed=True) for turn in TURNS),
            _judged_cell(found[category, None]),
        )
        for category in _categories(found)
    )
    caption = f"Above 0: {one} is better. Paired: over the answers that both were judged on. {_CAPTION}"
    return Table(f"Single scores of {one} less those of {two}", ("category", *_TURN_COLUMNS, "judged"), rows, caption)


def _pair_table(one: str, two: str, judge: str, found: Mapping[Where, Score]) -> Table:
    rows = tuple(
        (
            _name_cell(category if turn is None else TURN_NAMES[turn]),
            *(Cell(str(count), count) for count in score.counts.values()),
            _mean_cell(score, percent=True),
            _judged_cell(score),
            Cell(f"{score.unparsable}", score.unparsable),
        )
        for (category, turn), score in found.items()
        if turn is None or category == ALL  # those of a category are only in the files: ten comparisons say little
    )
    caption = (
        f"Both answers shown in both orders: a win of {one} where both orders say so, a tie where they say so or "
        f"disagree. Win share: a tie counts as half a win. {_CAPTION}"
    )
    columns = ("category", "wins", "ties", "losses", "orders disagree", "win share", "judged", "unparsable")
    return Table(f"{one} against {two}, judged by {judge}", columns, rows, caption)


def _name_cell(name: str) -> Cell:
    return Cell(name, name, strong=name == ALL)


def _mean_cell(score: Score, *, signed: bool = False, percent: bool = False) -> Cell:
    if score.mean is None:
        return Cell(NOT_YET)
    form = "{:.0%}" if percent else "{:+.2f}" if signed else "{:.2f}"
    text = form.format(score.mean)
    if score.low is not None:
        text += f" ({form.format(score.low)}{' to ' if signed else '–'}{form.format(score.high)})"
    return Cell(text.replace("-", "−"), score.mean)


def _judged_cell(score: Score) -> Cell:
    return Cell(f"{score.judged}" if score.complete else f"{score.judged} of {score.expected}", score.judged)


def write_results(scores: Scores, tables: Sequence[Table], directory: Path, about: dict[str, Any]) -> list[Path]:
    """Write ``tables.md``, ``scores.csv`` and ``scores.json``; return their paths.

    Args:
        about: a description of what was run, for the JSON file.
    """
    paths = [directory / name for name in ("tables.md", "scores.csv", "scores.json")]
    rows = [score.row for score in scores.scores]
    write_atomically(paths[0], "# MT-Bench\n\n" + "\n".join(table.markdown() for table in tables))
    write_csv(paths[1], rows)
    document = {**about, "scores": rows}
    write_atomically(paths[2], json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return paths
