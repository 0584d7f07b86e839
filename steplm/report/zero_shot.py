"""Zero-shot results as a table in Markdown, CSV and JSON; see ``steplm.eval.zero_shot`` for the JSON schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steplm.eval.bootstrap import Difference
from steplm.eval.perplexity import PerplexityResult, comparison_note
from steplm.eval.scores import Metric
from steplm.eval.zero_shot import ZeroShotResults
from steplm.files import write_atomically
from steplm.report.evaluations import Evaluation, save_evaluation
from steplm.report.runs import NOT_YET
from steplm.report.tables import Cell, Table, write_csv
from steplm.units import format_count


@dataclass(frozen=True)
class TextScore:
    """The result of a model on a text; ``name`` is empty if the text has none."""

    model: str
    name: str
    data: tuple[str, ...]
    result: PerplexityResult

    def as_json(self) -> dict[str, Any]:
        """Counts and means, with the model and text that they belong to."""
        about = {"model": self.model, "name": self.name, "data": list(self.data)}
        counts = ("num_tokens", "num_text_bytes", "num_skipped_records")
        return about | {name: getattr(self.result, name) for name in (*counts, "loss", "perplexity", "bits_per_byte")}


def tasks_table(results: ZeroShotResults) -> Table:
    """One row per task and metric; one column per model, and one for its difference from the first model."""
    first, *others = results.models
    labels = results.labels
    columns = ["task", "items", "chance", labels[first]]
    for model in others:
        columns += [labels[model], f"Δ {labels[model]}" if len(others) > 1 else "Δ"]
    rows = [
        _row(results, task, name, metric)
        for task in results.tasks
        for name, metric in results.of(task)[0].metrics.items()
    ]
    if results.averaged:
        cells = [Cell("average", strong=True), Cell(NOT_YET), Cell(NOT_YET)]
        for model in results.models:
            cells.append(Cell(_number(*results.average(model), is_share=True), results.average(model)[0]))
            if model != first:
                cells.append(_difference_cell(results.average_difference(model), is_share=True, higher_is_better=True))
        rows.append(tuple(cells))
    return Table("Zero-shot tasks", tuple(columns), tuple(rows), _caption(results))


def _row(results: ZeroShotResults, task: str, name: str, metric: Metric) -> tuple[Cell, ...]:
    scored = results.of(task)
    chance = scored[0].chance if name.startswith("acc") else None
    is_share = all(result.metrics[name].is_share for result in scored)
    cells = [
        Cell(f"{task}, {name}"),
        Cell(f"{scored[0].num_items:,}", scored[0].num_items),
        Cell(NOT_YET) if chance is None else Cell(f"{100 * chance:.1f}", chance),
    ]
    for model, result in zip(results.models, scored, strict=True):
        value, stderr = result.metrics[name].value, result.metrics[name].stderr
        cells.append(Cell(_number(value, stderr, is_share=is_share), value))
        if model != results.models[0]:
            gap = results.difference(model, task, name)
            cells.append(_difference_cell(gap, is_share=is_share, higher_is_better=metric.higher_is_better))
    return tuple(cells)


def _number(value: float, stderr: float | None, *, is_share: bool) -> str:
    return _written(value, is_share) + ("" if stderr is None else f" ± {_written(stderr, is_share)}")


def _written(number: float, is_share: bool, sign: str = "") -> str:
    if is_share:
        return f"{100 * number:{sign}.1f}".replace("-", "−")
    if abs(number) >= 1000:  # an untrained model's perplexity has seven digits
        return ("+" if sign and number > 0 else "") + format_count(number).replace("-", "−")
    return f"{number:{sign}.2f}".replace("-", "−")


def _difference_cell(gap: Difference | None, *, is_share: bool, higher_is_better: bool) -> Cell:
    if gap is None:
        return Cell(NOT_YET)
    value, low, high = (_written(number, is_share, "+") for number in (gap.value, gap.low, gap.high))
    tone = ""
    if gap.leaves_out_zero:
        tone = "better" if (gap.value > 0) == higher_is_better else "worse"
    return Cell(f"{value} [{low}, {high}]", gap.value, strong=gap.leaves_out_zero, tone=tone)


def _caption(results: ZeroShotResults) -> str:
    parts = ["Accuracies in percent, ± one standard error."]
    if len(results.models) > 1:
        parts.append(
            f"Δ: less {results.labels[results.models[0]]}, with the 95% interval of a bootstrap over the same items; "
            "bold where it leaves out 0."
        )
    if results.averaged:
        metrics = ", ".join(f"{task} {metric}" for task, metric in results.averaged.items())
        parts.append(f"Average: of {metrics}; each task counts the same.")
    limit = results.of(results.tasks[0])[0].limit
    if limit is not None:
        parts.append(f"Only the first {limit:,} items of each task: not comparable with published numbers.")
    shots = sorted({result.num_fewshot for task in results.tasks for result in results.of(task)} - {0})
    if shots:
        parts.append(f"With {', '.join(map(str, shots))} solved examples before each item.")
    cut = [
        f"{result.num_truncated:,} requests of {task}"
        for task in results.tasks
        if (result := max(results.of(task), key=lambda r: r.num_truncated)).num_truncated
    ]
    if cut:
        parts.append(f"Longer than a model's context, and cut at the left: {', '.join(cut)}.")
    return " ".join(parts)


def texts_table(scores: Sequence[TextScore]) -> Table | None:
    """Perplexity and bits per byte, one row per model and text; ``None`` without texts.

    If models split a text into different tokens, bits per byte come first and the caption says why.
    """
    if not scores:
        return None
    named = any(score.name for score in scores)
    found = {name: comparison_note([s.result for s in scores if s.name == name]) for name in {s.name for s in scores}}
    notes = [f"{name or 'Text'}: {note}." for name, note in sorted(found.items()) if note]
    rows = []
    for score in scores:
        result = score.result
        bits = Cell(NOT_YET) if result.bits_per_byte is None else Cell(f"{result.bits_per_byte:.4f}")
        text = [Cell(score.name)] if named else []
        perplexity = Cell(f"{result.perplexity:.3f}")
        values = (bits, perplexity) if notes else (perplexity, bits)
        rows.append((Cell(score.model), *text, Cell(f"{result.num_tokens:,}"), *values))
    names = ("bits per byte", "perplexity") if notes else ("perplexity", "bits per byte")
    columns = ("model", *(["text"] if named else []), "tokens", *names)
    return Table("Perplexity", columns, tuple(rows), " ".join(notes))


def document(results: ZeroShotResults | None, texts: Sequence[TextScore]) -> dict[str, Any] | list[dict[str, Any]]:
    """The JSON document: tasks with perplexities, or perplexities alone."""
    scores = [score.as_json() for score in texts]
    return scores if results is None else {**results.as_json(), "perplexity": scores}


def write_results(results: ZeroShotResults | None, texts: Sequence[TextScore], folder: Path) -> list[Path]:
    """Write ``zero_shot.md``, ``.csv``, ``.json`` and, if there is an accuracy, ``.png``; return their paths.

    Also writes ``zero_shot.tables.json``, which ``steplm report`` shows. Without tasks the files are named
    ``perplexity``.
    """
    from steplm.report.zero_shot_figure import accuracy_figure

    folder.mkdir(parents=True, exist_ok=True)
    name = "perplexity" if results is None else "zero_shot"
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in ("md", "csv", "json", "png")}
    tables = [
        table for table in (None if results is None else tasks_table(results), texts_table(texts)) if table is not None
    ]
    write_atomically(paths["md"], "\n".join(table.markdown() for table in tables))
    write_csv(paths["csv"], [*(_csv_rows(results) if results else ()), *_csv_texts(texts)])
    write_atomically(paths["json"], json.dumps(document(results, texts), indent=1, allow_nan=False) + "\n")
    if results is None or not accuracy_figure(results, paths["png"]):
        del paths["png"]
    figures = tuple(path for suffix, path in paths.items() if suffix == "png")
    title = "Perplexity" if results is None else "Zero-shot tasks"
    save_evaluation(folder, name, Evaluation(title, tuple(tables), figures))
    return list(paths.values())


def _csv_rows(results: ZeroShotResults) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(model: str, task: str, metric: str, value: float, stderr: float | None, gap: Difference | None) -> None:
        rows.append(
            {
                "model": model,
                "label": results.labels[model],
                "task": task,
                "metric": metric,
                "value": value,
                "stderr": stderr,
                "difference": gap and gap.value,
                "difference_ci95_low": gap and gap.low,
                "difference_ci95_high": gap and gap.high,
            }
        )

    for task in results.tasks:
        for model, result in zip(results.models, results.of(task), strict=True):
            for name, metric in result.metrics.items():
                add(model, task, name, metric.value, metric.stderr, results.difference(model, task, name))
                rows[-1] |= {key: getattr(result, key) for key in ("chance", "num_items", "num_fewshot")}
    for model in results.models if results.averaged else ():
        add(model, "average", "accuracy", *results.average(model), results.average_difference(model))
    return rows


def _csv_texts(texts: Sequence[TextScore]) -> list[dict[str, Any]]:
    return [
        {"model": score.model, "task": score.name or "text", "metric": metric, "value": value}
        for score in texts
        for metric, value in (("perplexity", score.result.perplexity), ("bits_per_byte", score.result.bits_per_byte))
    ]
