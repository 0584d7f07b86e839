"""The tables of a suite, for Markdown and the page, and the same numbers as CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steplm.report.runs import NOT_YET
from steplm.report.suite import EntryRecord, Question, SuiteRecord
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


def _cell(value: Any, write: Callable[[Any], str]) -> Cell:
    return Cell(NOT_YET) if value is None else Cell(write(value), value)


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


def _table(title: str, rows: Sequence[Mapping[str, Cell]], caption: str) -> Table:
    """A table from rows by column, without the columns that are empty in every row."""
    first, *others = rows[0] if rows else ("",)
    columns = (first, *(name for name in others if any(row[name].text != NOT_YET for row in rows)))
    return Table(title, columns, tuple(tuple(row[name] for name in columns) for row in rows), caption)


# --- a question -----------------------------------------------------------------------------------------


def question_table(suite: Suite, question: Question) -> Table:
    """Quality, memory and cost: one row per entry, baseline first."""
    baseline = suite.entries[question.baseline] if question.baseline else None
    against = f"against {baseline.label if baseline else 'vanilla'}"
    rows = []
    for entry in suite.of(question):
        is_baseline = baseline is entry
        name = f"{entry.label} (baseline)" if is_baseline else entry.label
        loss_difference, verdict = _difference_cells(entry, baseline)
        rows.append(
            {
                "method": Cell(name, name, strong=is_baseline),
                "seeds": Cell(entry.state, len(entry.finished)),
                "perplexity": _perplexity_cell(entry.validation_loss),
                **{f"{text} perplexity": _perplexity_cell(entry.losses.get(text)) for text in suite.texts},
                "Δ loss": loss_difference,
                "verdict": verdict,
                "model state planned": _cell(entry.row["planned_peak_model_state_bytes"], format_bytes),
                "model state measured": _cell(entry.row["measured_peak_model_state_bytes"], format_bytes),
                against: _reduction_cell(entry, baseline),
                "tok/s": _cell(entry.row["median_tokens_per_second"], "{:,.0f}".format),
                "time": _cell(entry.row["median_elapsed_seconds"], format_seconds),
                "tokens": _cell(entry.row["tokens"], format_count),
                "FLOPs": _cell(entry.row["training_flops"], format_count),
                "validation loss": _estimate_cell(entry.validation_loss, 4),
            }
        )
    return _table(question.title, rows, _caption(suite, question, baseline))


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
    most_seeds = max((len(entry.finished) for entry in suite.of(question)), default=0)
    if most_seeds == 0:
        return "No run has finished yet."
    parts = ["Loss: nats per token of the exported model on the validation text."]
    if most_seeds > 1:
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
    matched = {"tokens": ("tokens", "tokens"), "flops": ("training_flops", "training FLOPs")}
    if suite.record.match in matched:
        column, words = matched[suite.record.match]
        numbers = {entry.label: n for entry in entries if (n := entry.row[column]) is not None}
        if numbers and max(numbers.values()) > 1.01 * min(numbers.values()):
            least, most = min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)
            result.append(
                f"Not equal in {words}: {least} {format_count(numbers[least])}, {most} {format_count(numbers[most])}."
            )
    return result


def details_table(suite: Suite, question: Question) -> Table:
    """Bits per byte on other texts, total peak memory and learning rate of each entry of a question."""
    rows = []
    for entry in suite.of(question):
        rate, plan = entry.entry.learning_rate, entry.plan
        rows.append(
            {
                "method": Cell(entry.label, entry.label),
                "layers": Cell(NOT_YET) if plan is None else Cell("+".join(map(str, plan.layers)), plan.num_stages),
                "learning rate": _cell(rate, ("{:g} (edge)" if entry.entry.at_edge else "{:g}").format),
                **{f"{text} bits/byte": _estimate_cell(entry.bits_per_byte(text), 4) for text in suite.texts},
                "planned peak": _cell(entry.row["planned_peak_bytes"], format_bytes),
                "measured peak": _cell(entry.row["measured_peak_allocated_bytes"], format_bytes),
                "planned dry run": _cell(entry.row["planned_dry_run_peak_bytes"], format_bytes),
                "measured dry run": _cell(entry.row["measured_dry_run_peak_bytes"], format_bytes),
            }
        )
    caption = (
        "Peak: bytes of all tensors on the device, in the stage that needs the most. "
        "Dry run: a step without its update, at the start of a stage."
    )
    return _table(f"{question.title}: further numbers", rows, caption)


# --- the learning rates tried -------------------------------------------------------------------------------


def tuning_table(suite: Suite) -> Table | None:
    """Validation loss of each entry at each learning rate, with the chosen one in bold; ``None`` without a grid."""
    record = suite.record
    tried = [entry for entry in record.entries if entry.tuned]
    if not record.grid or not tried:
        return None
    rows = [
        (Cell(entry.label, entry.label), *(_tuning_cell(suite, entry, rate) for rate in record.grid)) for entry in tried
    ]
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


def _tuning_cell(suite: Suite, entry: EntryRecord, rate: float) -> Cell:
    run, is_chosen = tuning_run(suite, entry.name, rate), rate == entry.learning_rate
    if run is None:
        return Cell(NOT_YET)
    if run.validation_loss is None:
        return Cell(run.entry.status, None, strong=is_chosen)
    edge = " (edge)" if is_chosen and entry.at_edge else ""
    return Cell(f"{run.validation_loss:.4f}{edge}", run.validation_loss, strong=is_chosen)


# --- the stages of one run ----------------------------------------------------------------------------------


def stages_table(entry: EntrySummary) -> Table | None:
    """Layers, tokens, loss and bytes of each stage of a run; ``None`` without a plan."""
    record = entry.record
    if record is None:
        return None
    started = {event["stage"]: event for event in record.events_of("stage_start")}
    ended = {event["stage"] for event in record.events_of("stage_end")}
    last_loss = {event["stage"]: event["loss"] for event in record.events_of("eval")}
    rows = []
    for stage in record.plan.stages:
        start = started.get(stage.index, {})
        state = "waiting" if not start else "finished" if stage.index in ended else "running"
        rows.append(
            {
                "stage": Cell(str(stage.index), stage.index),
                "state": Cell(state, state),
                "layers": Cell(str(stage.num_hidden_layers), stage.num_hidden_layers),
                "new": Cell(str(stage.num_new_layers), stage.num_new_layers),
                "tokens": Cell(format_count(stage.tokens), stage.tokens),
                "validation loss": _cell(last_loss.get(stage.index), "{:.4f}".format),
                "model state planned": Cell(format_bytes(stage.memory.total_bytes), stage.memory.total_bytes),
                "measured": _cell(start.get("measured_bytes", {}).get("total"), format_bytes),
                "planned peak": _cell(stage.peak and stage.peak.total_bytes, format_bytes),
                "planned dry run": _cell(start.get("planned_dry_run_bytes"), format_bytes),
                "measured dry run": _cell(start.get("measured_dry_run_bytes"), format_bytes),
            }
        )
    caption = "Validation loss: nats per token, at the latest evaluation of a stage."
    return _table(f"Stages of {entry.label}", rows, caption)


def sources_table(entry: EntrySummary) -> Table | None:
    """The latest loss on each source of a mixture and each validation set; ``None`` if there is one of each."""
    rows = []
    for kind, what in (("train", "training source"), ("eval", "validation set")):
        for event in entry.record.events_of(kind)[-1:] if entry.record else ():
            for key, loss in event.items():
                if key.startswith("loss_") and isinstance(loss, float):
                    rows.append((Cell(key.removeprefix("loss_")), Cell(what), Cell(f"{loss:.4f}", loss)))
    caption = "Loss: nats a token, in the last line of the log; of a source, over the steps since the line before."
    return Table(f"Sources of {entry.label}", ("name", "kind", "loss"), tuple(rows), caption) if rows else None


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
        differences = {}
        baseline = suite.entries[question.baseline] if question.baseline else None
        for entry in suite.of(question):
            gap = difference(entry, baseline) if baseline is not None and entry is not baseline else None
            if gap is not None:
                differences[entry.entry.name] = {
                    "loss_difference_mean": gap.estimate.mean,
                    "loss_difference_ci95_low": gap.estimate.low,
                    "loss_difference_ci95_high": gap.estimate.high,
                    "pairs": gap.estimate.n,
                    "verdict": gap.verdict,
                }
        questions.append({"title": question.title, "baseline": question.baseline, "differences": differences})
    return {"name": suite.record.name, "match": suite.record.match, "entries": entries, "questions": questions}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
