"""The tables of a suite, for Markdown and the page, and the same numbers as CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steplm.planner.plan import Stage
from steplm.report.runs import NOT_YET
from steplm.report.suite import Question, SuiteRecord
from steplm.report.summary import EntrySummary, Estimate, Suite, SuiteRun, difference
from steplm.units import format_bytes, format_count, format_seconds, percent


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, sort key and emphasis."""

    text: str
    value: int | float | str | None = None
    strong: bool = False
    tone: str = ""  # "better" or "worse"


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def markdown(self) -> str:
        """Render as a GitHub table under a bold title, with numbers right-aligned."""
        lines = [
            f"**{self.title}**",
            "",
            _line(map(_escaped, self.columns)),
            _line(["---", *["---:"] * (len(self.columns) - 1)]),
            *(_line([f"**{_escaped(c.text)}**" if c.strong else _escaped(c.text) for c in row]) for row in self.rows),
        ]
        return "\n".join(lines) + (f"\n\n{self.caption}\n" if self.caption else "\n")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cell(value: Any, write: Callable[[Any], str], *, strong: bool = False) -> Cell:
    return Cell(NOT_YET) if value is None else Cell(write(value), value, strong)


def _estimate_cell(value: Estimate | None, digits: int) -> Cell:
    if value is None:
        return Cell(NOT_YET)
    half = value.half_width
    return Cell(f"{value.mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}"), value.mean)


def _perplexity_cell(loss: Estimate | None) -> Cell:
    if loss is None:
        return Cell(NOT_YET)
    value = loss.exp()
    interval = "" if value.low is None else f" ({value.low:.2f}–{value.high:.2f})"
    return Cell(f"{value.mean:.2f}{interval}", value.mean)


def _without_empty(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> Table:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i].text != NOT_YET for row in rows)]
    return Table(title, tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows), caption)


# --- a question -----------------------------------------------------------------------------------------


def question_table(suite: Suite, question: Question) -> Table:
    """Quality, memory and cost: one row per entry, baseline first."""
    baseline = suite.entries[question.baseline] if question.baseline else None
    columns = (
        "method", "seeds", "perplexity", *(f"{text} perplexity" for text in suite.texts), "Δ loss", "verdict",
        "model state planned", "model state measured",
        f"against {baseline.label if baseline else 'vanilla'}", "tok/s", "time", "tokens", "FLOPs", "validation loss",
    )  # fmt: skip
    rows = [_question_row(entry, baseline, suite.texts) for entry in suite.of(question)]
    return _without_empty(question.title, columns, rows, _caption(suite, question, baseline))


def _question_row(entry: EntrySummary, baseline: EntrySummary | None, texts: Sequence[str]) -> list[Cell]:
    is_baseline = baseline is entry
    name = f"{entry.label} (baseline)" if is_baseline else entry.label
    return [
        Cell(name, name, strong=is_baseline),
        Cell(entry.state, len(entry.finished)),
        _perplexity_cell(entry.validation_loss),
        *(_perplexity_cell(entry.losses.get(text)) for text in texts),
        *_difference_cells(entry, baseline),
        _cell(entry.row["planned_peak_model_state_bytes"], format_bytes),
        _cell(entry.row["measured_peak_model_state_bytes"], format_bytes),
        _reduction_cell(entry, baseline),
        _cell(entry.row["median_tokens_per_second"], "{:,.0f}".format),
        _cell(entry.row["median_elapsed_seconds"], format_seconds),
        _cell(entry.row["tokens"], format_count),
        _cell(entry.row["training_flops"], format_count),
        _estimate_cell(entry.validation_loss, 4),
    ]


def _difference_cells(entry: EntrySummary, baseline: EntrySummary | None) -> tuple[Cell, Cell]:
    gap = None if baseline is None or baseline is entry else difference(entry, baseline)
    if gap is None:
        return Cell(NOT_YET), Cell(NOT_YET)
    half = gap.estimate.half_width
    text = f"{gap.estimate.mean:+.4f}".replace("-", "−") + ("" if half is None else f" ± {half:.4f}")
    diverged = gap.verdict.endswith("diverged")
    verdict = gap.verdict if gap.estimate.n == 1 or diverged else f"{gap.verdict}, n = {gap.estimate.n}"
    tone = "worse" if diverged else gap.verdict if gap.verdict in ("better", "worse") else ""
    return Cell(text, gap.estimate.mean), Cell(verdict, gap.verdict, tone=tone)


def _reduction_cell(entry: EntrySummary, baseline: EntrySummary | None) -> Cell:
    if baseline is None:  # then against vanilla, from the plan
        return _cell((entry.plan.reduction or None) if entry.plan else None, lambda share: percent(-share))
    if baseline is entry or entry.plan is None or baseline.plan is None:
        return Cell(NOT_YET)
    share = entry.plan.peak_model_state_bytes / baseline.plan.peak_model_state_bytes - 1
    return Cell(percent(share), share)


def _caption(suite: Suite, question: Question, baseline: EntrySummary | None) -> str:
    """Explanations of the columns, and warnings."""
    several = any(len(entry.finished) > 1 for entry in suite.of(question))
    if not any(entry.finished for entry in suite.of(question)):
        return "No run has finished yet."
    parts = ["Loss: nats per token of the exported model on the validation text."]
    if several:
        parts.append("±, ranges in brackets: 95% t-interval of the mean over seeds.")
    else:
        parts.append("One seed: no interval can be given.")
    if baseline is not None:
        parts.append(f"Δ loss: minus that of {baseline.label}, paired by seed; below 0 is better.")
        parts.append("A verdict is given where the interval excludes 0.")
    parts.append("Model state: of the largest stage; its planned bytes are compared with the baseline's, or vanilla's.")
    parts.append("tok/s, time: medians over seeds.")
    return " ".join([*parts, *warnings(suite, question)])


def warnings(suite: Suite, question: Question) -> list[str]:
    """Warnings about a question's table."""
    entries = suite.of(question)
    result = []
    if edges := [entry.label for entry in entries if entry.entry.at_edge]:
        result.append(f"The best learning rate is at the edge of the grid for {', '.join(edges)}.")
    column = {"tokens": "tokens", "flops": "training_flops"}.get(suite.record.match)
    if column is not None:
        numbers = {entry.label: n for entry in entries if (n := entry.row[column]) is not None}
        if numbers and max(numbers.values()) > 1.01 * min(numbers.values()):
            least, most = min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)
            result.append(
                f"Not equal in {AXIS_WORDS[suite.record.match]}: {least} {format_count(numbers[least])}, "
                f"{most} {format_count(numbers[most])}."
            )
    return result


AXIS_WORDS = {"tokens": "tokens", "flops": "training FLOPs"}


def details_table(suite: Suite, question: Question) -> Table:
    """Bits per byte on other texts, total peak memory and learning rate of each entry of a question."""
    texts = suite.texts
    columns = ["method", "layers", "learning rate", *(f"{text} bits/byte" for text in texts)]
    peaks = {
        "planned peak": "planned_peak_bytes",
        "measured peak": "measured_peak_allocated_bytes",
        "planned dry run": "planned_dry_run_peak_bytes",
        "measured dry run": "measured_dry_run_peak_bytes",
    }
    rows = []
    for entry in suite.of(question):
        rate, plan = entry.entry.learning_rate, entry.plan
        rows.append(
            [
                Cell(entry.label, entry.label),
                Cell(NOT_YET) if plan is None else Cell("+".join(map(str, plan.layers)), plan.num_stages),
                _cell(rate, ("{:g} (edge)" if entry.entry.at_edge else "{:g}").format),
                *(_estimate_cell(entry.bits_per_byte(text), 4) for text in texts),
                *(_cell(entry.row[name], format_bytes) for name in peaks.values()),
            ]
        )
    caption = (
        "Peak: all bytes of tensors on the device, in the stage with the most. "
        "Dry run: a step without its update, at the start of a stage."
    )
    return _without_empty(f"{question.title}: further numbers", [*columns, *peaks], rows, caption)


# --- the learning rates tried -------------------------------------------------------------------------------


def tuning_table(suite: Suite) -> Table | None:
    """Validation loss of each entry at each learning rate, with the chosen one in bold; ``None`` without a grid."""
    record = suite.record
    tried = [entry for entry in record.entries if entry.tuned]
    if not record.grid or not tried:
        return None
    rows = []
    for entry in tried:
        cells = [Cell(entry.label, entry.label)]
        for rate in record.grid:
            run = tuning_run(suite, entry.name, rate)
            chosen = rate == entry.learning_rate
            cells.append(_tuning_cell(run, chosen, edge=chosen and entry.at_edge))
        rows.append(tuple(cells))
    caption = f"Validation loss of seed {record.tune_seed}, nats per token. Bold: the choice, {how_chosen(record)}."
    if any(entry.at_edge for entry in tried):
        caption += " Edge: the best rate is the lowest or highest tried; a better one may lie beyond."
    return Table("Learning rates", ("method", *(f"{rate:g}" for rate in record.grid)), tuple(rows), caption)


def how_chosen(record: SuiteRecord) -> str:
    """How a learning rate of the grid was chosen, in words."""
    if record.finalists == 1:
        return "used for all seeds"
    return f"of the {record.finalists} best the one with the lowest mean over all seeds"


def tuning_run(suite: Suite, entry: str, rate: float) -> SuiteRun | None:
    """The run that tried a rate."""
    seed = suite.record.tune_seed
    return next(
        (r for r in suite.runs if (r.entry.entry, r.entry.learning_rate, r.entry.seed) == (entry, rate, seed)), None
    )


def _tuning_cell(run: SuiteRun | None, chosen: bool, edge: bool) -> Cell:
    if run is None:
        return Cell(NOT_YET)
    if run.validation_loss is None:
        return Cell(run.entry.status, None, strong=chosen)
    return Cell(f"{run.validation_loss:.4f}" + (" (edge)" if edge else ""), run.validation_loss, strong=chosen)


# --- the stages of one run ----------------------------------------------------------------------------------


def stages_table(entry: EntrySummary) -> Table | None:
    """Layers, tokens, loss and bytes of each stage of a run; ``None`` without a plan."""
    record = entry.record
    if record is None:
        return None
    started = {event["stage"]: event for event in record.events_of("stage_start")}
    ended = {event["stage"] for event in record.events_of("stage_end")}
    last_loss = {event["stage"]: event["loss"] for event in record.events_of("eval")}
    rows = [
        _stage_row(stage, started.get(stage.index), stage.index in ended, last_loss.get(stage.index))
        for stage in record.plan.stages
    ]
    columns = (
        "stage", "state", "layers", "new", "tokens", "validation loss", "model state planned", "measured",
        "planned peak", "planned dry run", "measured dry run",
    )  # fmt: skip
    return _without_empty(
        f"Stages of {entry.label}",
        columns,
        rows,
        "Validation loss: nats per token, at the latest evaluation of a stage.",
    )


def sources_table(entry: EntrySummary) -> Table | None:
    """The latest loss on each source of a mixture and each validation set; ``None`` if there is one of each."""
    record, rows = entry.record, list[list[Cell]]()
    if record is None:
        return None
    for kind, what in (("train", "training source"), ("eval", "validation set")):
        for event in record.events_of(kind)[-1:]:
            losses = {name: loss for key, loss in event.items() if (name := key.removeprefix("loss_")) != key}
            rows += [
                [Cell(name), Cell(what), _cell(loss, "{:.4f}".format)]
                for name, loss in losses.items()
                if isinstance(loss, float)
            ]
    if not rows:
        return None
    caption = "Loss: nats a token, in the last line of the log; of a source, over the steps since the line before."
    return Table(f"Sources of {entry.label}", ("name", "kind", "loss"), tuple(map(tuple, rows)), caption)


def _stage_row(stage: Stage, start: dict[str, Any] | None, ended: bool, loss: float | None) -> list[Cell]:
    state = "waiting" if start is None else "finished" if ended else "running"
    start = start or {}
    return [
        Cell(str(stage.index), stage.index),
        Cell(state, state),
        Cell(str(stage.num_hidden_layers), stage.num_hidden_layers),
        Cell(str(stage.num_new_layers), stage.num_new_layers),
        Cell(format_count(stage.tokens), stage.tokens),
        _cell(loss, "{:.4f}".format),
        Cell(format_bytes(stage.memory.total_bytes), stage.memory.total_bytes),
        _cell(start.get("measured_bytes", {}).get("total"), format_bytes),
        _cell(None if stage.peak is None else stage.peak.total_bytes, format_bytes),
        _cell(start.get("planned_dry_run_bytes"), format_bytes),
        _cell(start.get("measured_dry_run_bytes"), format_bytes),
    ]


# --- files ------------------------------------------------------------------------------------------------


def all_tables(suite: Suite) -> list[Table]:
    """The main and details tables of every question, then the learning rates."""
    tables = [make(suite, question) for question in suite.record.questions for make in (question_table, details_table)]
    tuning = tuning_table(suite)
    return [table for table in (*tables, tuning) if table is not None and len(table.columns) > 1]


def problems(suite: Suite) -> list[str]:
    """One line for each run without a result, with its error."""
    return [
        f"{suite.entries[run.entry.entry].label}, seed {run.entry.seed}, learning rate {run.entry.learning_rate:g}: "
        f"{run.entry.status}" + (f" ({run.entry.error})" if run.entry.error else "")
        for run in suite.runs
        if run.entry.status != "finished"
    ]


def write_tables(suite: Suite, directory: Path, evaluations: Sequence[str] = ()) -> list[Path]:
    """Write ``tables.md``, ``runs.csv``, ``summary.csv`` and ``summary.json``; return their paths.

    Args:
        evaluations: additional Markdown sections for ``tables.md``.
    """
    parts = [f"# {suite.record.name}\n", *(table.markdown() for table in all_tables(suite))]
    if unfinished := problems(suite):
        parts.append("**Runs without a result**\n\n" + "".join(f"- {line}\n" for line in unfinished))
    tables = directory / "tables.md"
    tables.write_text("\n".join([*parts, *evaluations]), encoding="utf-8")
    runs = write_csv(directory / "runs.csv", [run.row for run in suite.runs])
    entries = [entry.row for entry in suite.entries.values()]
    summary = write_csv(directory / "summary.csv", entries)
    document = directory / "summary.json"
    document.write_text(json.dumps(_summary(suite, entries), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [tables, runs, summary, document]


def _summary(suite: Suite, entries: list[dict[str, Any]]) -> dict[str, Any]:
    questions = []
    for question in suite.record.questions:
        baseline = suite.entries[question.baseline] if question.baseline else None
        gaps = {e.entry.name: difference(e, baseline) for e in suite.of(question) if baseline and e is not baseline}
        questions.append(
            {
                "title": question.title,
                "baseline": question.baseline,
                "differences": {
                    name: {
                        "loss_difference_mean": gap.estimate.mean,
                        "loss_difference_ci95_low": gap.estimate.low,
                        "loss_difference_ci95_high": gap.estimate.high,
                        "pairs": gap.estimate.n,
                        "verdict": gap.verdict,
                    }
                    for name, gap in gaps.items()
                    if gap is not None
                },
            }
        )
    return {"name": suite.record.name, "match": suite.record.match, "entries": entries, "questions": questions}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
