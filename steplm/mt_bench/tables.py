"""The scores as Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steplm.files import write_atomically
from steplm.mt_bench.scores import ALL, CONFIDENCE, WHERE, Mean, PairScore, ScoreDifference, Scores, SingleScore
from steplm.report.runs import NOT_YET
from steplm.report.tables import Cell, Table, write_csv

TURN_NAMES = {None: "both turns", 1: "turn 1", 2: "turn 2"}
_CAPTION = (
    f"In brackets: {CONFIDENCE:.0%} interval, bootstrap over questions. "
    "Judged: judgments that the numbers of a row are of; nothing stands in for one that is missing."
)


def all_tables(scores: Scores, judge: str) -> list[Table]:
    """The models side by side, then each by category, then every two against each other."""
    tables = []
    models = list(dict.fromkeys(score.model for score in scores.singles))
    if len(models) > 1:
        rows = [_single_row(model, [scores.single(model, ALL, turn).score for turn in WHERE]) for model in models]
        tables.append(_single_table(f"MT-Bench, single answers, judged by {judge}", "model", rows))
    for model in models:
        categories = dict.fromkeys(score.category for score in scores.singles)
        rows = [_single_row(name, [scores.single(model, name, turn).score for turn in WHERE]) for name in categories]
        tables.append(_single_table(f"{model}, single answers, judged by {judge}", "category", rows))
    for one, two in dict.fromkeys((d.model_1, d.model_2) for d in scores.differences):
        differences = [d for d in scores.differences if (d.model_1, d.model_2) == (one, two)]
        tables.append(_difference_table(one, two, differences))
    for one, two in dict.fromkeys((p.model_1, p.model_2) for p in scores.pairs):
        pairs = [p for p in scores.pairs if (p.model_1, p.model_2) == (one, two)]
        tables.append(_pair_table(one, two, judge, pairs))
    return tables


def _single_table(title: str, first: str, rows: Sequence[tuple[Cell, ...]]) -> Table:
    caption = f"Score 1 to 10, mean over answers. {_CAPTION}"
    if any(row[-1].value for row in rows):
        caption += " Unparsable: replies without a score, however often asked; in no mean."
    columns = (first, *(TURN_NAMES[turn] for turn in WHERE), "judged", "unparsable")
    return Table(title, columns, tuple(rows), caption)


def _single_row(name: str, means: Sequence[Mean]) -> tuple[Cell, ...]:
    both = means[0]
    return (
        Cell(name, name, strong=name == ALL),
        *map(_mean_cell, means),
        _judged_cell(both),
        Cell(f"{both.unparsable}", both.unparsable),
    )


def _difference_table(one: str, two: str, differences: Sequence[ScoreDifference]) -> Table:
    rows = []
    for name in dict.fromkeys(difference.category for difference in differences):
        by_turn = {d.turn: d.difference for d in differences if d.category == name}
        rows.append(
            (
                Cell(name, name, strong=name == ALL),
                *(_mean_cell(by_turn[turn], signed=True) for turn in WHERE),
                _judged_cell(by_turn[None]),
            )
        )
    caption = f"Above 0: {one} is better. Paired: over the answers that both were judged on. {_CAPTION}"
    columns = ("category", *(TURN_NAMES[turn] for turn in WHERE), "judged")
    return Table(f"Single scores of {one} less those of {two}", columns, tuple(rows), caption)


def _pair_table(one: str, two: str, judge: str, pairs: Sequence[PairScore]) -> Table:
    rows = []
    for pair in pairs:
        if pair.turn is not None and pair.category != ALL:
            continue  # in the files; ten comparisons a row say little
        name = pair.category if pair.turn is None else TURN_NAMES[pair.turn]
        rows.append(
            (
                Cell(name, name, strong=pair.category == ALL and pair.turn is None),
                *(Cell(str(count), count) for count in (pair.wins, pair.ties, pair.losses, pair.disagreements)),
                _mean_cell(pair.win_share, percent=True),
                _judged_cell(pair.win_share),
                Cell(f"{pair.win_share.unparsable}", pair.win_share.unparsable),
            )
        )
    caption = (
        f"Both answers shown in both orders: a win of {one} where both orders say so, a tie where they say so or "
        f"disagree. Win share: a tie counts as half a win. {_CAPTION}"
    )
    columns = ("category", "wins", "ties", "losses", "orders disagree", "win share", "judged", "unparsable")
    return Table(f"{one} against {two}, judged by {judge}", columns, tuple(rows), caption)


def _mean_cell(value: Mean, *, signed: bool = False, percent: bool = False) -> Cell:
    if value.mean is None:
        return Cell(NOT_YET)
    form = "{:.0%}" if percent else "{:+.2f}" if signed else "{:.2f}"
    text, low, high = (
        None if v is None else form.format(v).replace("-", "−") for v in (value.mean, value.low, value.high)
    )
    between = " to " if signed else "–"
    return Cell(f"{text}" + ("" if low is None else f" ({low}{between}{high})"), value.mean)


def _judged_cell(value: Mean) -> Cell:
    return Cell(f"{value.judged}" if value.complete else f"{value.judged} of {value.expected}", value.judged)


# --- files ------------------------------------------------------------------------------------------------


def write_results(scores: Scores, tables: Sequence[Table], directory: Path, about: dict[str, Any]) -> list[Path]:
    """``tables.md``, ``scores.csv`` and ``scores.json``; returns their paths.

    Args:
        about: what was run, for the JSON.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = "\n".join(table.markdown() for table in tables)
    write_atomically(page := directory / "tables.md", f"# MT-Bench\n\n{text}")
    rows = list(score_rows(scores))
    sheet = write_csv(directory / "scores.csv", rows)
    document = json.dumps({**about, "scores": rows}, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(whole := directory / "scores.json", document + "\n")
    return [page, sheet, whole]


def score_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One flat row a number, with what it is of."""
    for single in scores.singles:
        yield {"kind": "score", "model": single.model, **_where(single), **_numbers(single.score)}
    for gap in scores.differences:
        names = {"model": gap.model_1, "other": gap.model_2}
        yield {"kind": "score_difference", **names, **_where(gap), **_numbers(gap.difference)}
    for pair in scores.pairs:
        names = {"model": pair.model_1, "other": pair.model_2}
        counts = {"wins": pair.wins, "ties": pair.ties, "losses": pair.losses, "orders_disagree": pair.disagreements}
        yield {"kind": "win_share", **names, **_where(pair), **_numbers(pair.win_share), **counts}


def _where(score: SingleScore | ScoreDifference | PairScore) -> dict[str, Any]:
    return {"category": score.category, "turn": score.turn if score.turn else "both"}


def _numbers(value: Mean) -> dict[str, Any]:
    return {
        "mean": value.mean,
        "ci95_low": value.low,
        "ci95_high": value.high,
        "judged": value.judged,
        "expected": value.expected,
        "unparsable": value.unparsable,
    }
