"""``steplm eval``."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.cli.loading import load_torch
from steplm.cli.model_paths import find_model, require_hub
from steplm.errors import ConfigError
from steplm.files import write_errors
from steplm.units import format_count, format_seconds, parse_count

if TYPE_CHECKING:
    from steplm.eval.perplexity import PerplexityResult
    from steplm.eval.scores import TaskResult
    from steplm.eval.zero_shot import ZeroShotResults
    from steplm.report.zero_shot import TextScore

HUB_MAX_TOKENS = 10_000_000  # datasets on the hub can be very large
NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def run_eval(
    models: list[str],
    data: list[str],
    tasks: Sequence[str] = (),
    *,
    text_field: str = "text",
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: str | int | None = None,
    device: str = "auto",
    names: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    tasks_path: Sequence[Path] = (),
    tasks_data: Path | None = None,
    output: Path | None = None,
    json_output: bool = False,
) -> None:
    """Print the scores of each model on tasks and texts as tables or JSON; write both to ``output``.

    Without tasks, the JSON is a list with one object per model and text. With tasks, it is the document of
    ``steplm.eval.zero_shot``, with the same list under ``perplexity``. Scores already in ``output`` are reused.
    """
    wanted = [name.strip() for entry in tasks for name in entry.split(",") if name.strip()]
    if not wanted and not data:
        raise ConfigError("nothing to evaluate on: name tasks (--tasks piqa,arc_easy) or texts (--data FILE), or both")
    if not wanted and (limit is not None or num_fewshot is not None):
        raise ConfigError("--limit and --num-fewshot are for tasks: name some with --tasks")
    models = [find_model(model) for model in models]
    from steplm.eval.task_list import KNOWN_SETS

    has_all_sets = not wanted or (tasks_data is not None and set(wanted) <= set(KNOWN_SETS))
    if any("hub://" in entry for entry in data) or not has_all_sets:
        require_hub()
    load_torch()
    results = None
    if wanted:
        from steplm.eval.zero_shot import evaluate_tasks

        with _TaskDisplay() as display:
            results = evaluate_tasks(
                models,
                wanted,
                names=names,
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                tasks_path=tasks_path,
                tasks_data=tasks_data,
                output=output,
                device=device,
                progress=display,
            )
    texts = _score_texts(
        models,
        data,
        max_tokens,
        output,
        text_field=text_field,
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
        device=device,
    )
    _print(results, texts, json_output)
    from steplm.eval.perplexity import comparison_note

    for name in dict.fromkeys(score.name for score in texts):
        note = comparison_note([score.result for score in texts if score.name == name])
        if note is not None:
            print(f"note: {name or 'perplexity'}: {note}", file=sys.stderr)
    if output is not None:
        from steplm.report.zero_shot import write_results

        with write_errors(output):
            paths = write_results(results, texts, output)
        print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)


# --- tasks ------------------------------------------------------------------------------------------------


class _TaskDisplay:
    """Progress display: a bar on terminals for the current task, and a line for each finished model and task."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        # Keep the original stream: sys.stderr is replaced while library output is suppressed.
        self.console = Console(file=sys.stderr, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        self.bars = Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, redirect_stdout=False,
            redirect_stderr=False, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.bar = self.bars.add_task("preparing", total=None, done="")

    def __enter__(self) -> _TaskDisplay:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def begin(self, model: str, task: str) -> None:
        self.bars.reset(self.bar, total=None, description=f"{task}  {Path(model).name}", done="")

    def advance(self, done: int, total: int) -> None:
        self.bars.update(self.bar, completed=min(done, total), total=total, done=f"{min(done, total):,}/{total:,}")

    def finish(self, result: TaskResult, reused: bool) -> None:
        shown = [f"{name} {metric.value:.4g}" for name, metric in result.metrics.items()]
        how = "as saved" if reused else format_seconds(result.seconds)
        line = f"{result.task}  {result.model}  {', '.join(shown)}  {result.num_items:,} items  {how}"
        self.console.print(line, markup=False, soft_wrap=True, style="dim")


# --- texts ------------------------------------------------------------------------------------------------


def _score_texts(
    models: list[str], data: list[str], max_tokens: str | int | None, output: Path | None, **how: Any
) -> list[TextScore]:
    if not data:
        return []
    from steplm.report.zero_shot import TextScore

    try:
        limit = None if max_tokens is None else parse_count(max_tokens)
    except ValueError as error:
        raise ConfigError(f"max_tokens: {error}") from None
    named = _by_name(data)
    if limit is None and any(entry.startswith("hub://") for entries in named.values() for entry in entries):
        limit = HUB_MAX_TOKENS
        print(
            f"note: of hub data {format_count(limit)} tokens at most; --max-tokens sets another limit", file=sys.stderr
        )
    scores: list[TextScore] = []
    ends: dict[str, int | None] = {}  # bytes of each text within the first model's token limit
    for model in dict.fromkeys(models):
        for name, entries in named.items():
            end = ends.get(name)
            result = _score_text(model, name, entries, output, max_tokens=limit, max_bytes=end, **how)
            ends.setdefault(name, None if limit is None else result.num_text_bytes)
            scores.append(TextScore(model, name, tuple(entries), result))
    return scores


def _score_text(model: str, name: str, entries: list[str], output: Path | None, **how: Any) -> PerplexityResult:
    from steplm.eval.perplexity import evaluate_folder

    if output is None:
        return evaluate_folder(model, entries, **how)
    from steplm.eval.kept import evaluate_or_reuse

    started_at = time.monotonic()
    result, reused = evaluate_or_reuse(model, entries, output, **how)
    took = "as saved" if reused else format_seconds(time.monotonic() - started_at)
    print(
        f"{name or 'text'}  {model}  perplexity {result.perplexity:.4g}  {result.num_tokens:,} tokens  {took}",
        file=sys.stderr,
    )
    return result


def _by_name(data: list[str]) -> dict[str, list[str]]:
    """Group ``NAME=PATH`` entries by name; entries without a name form a single text with an empty name."""
    texts: dict[str, list[str]] = {}
    for entry in data:
        named = None if os.path.exists(entry) else NAMED.fullmatch(entry)
        texts.setdefault(named[1] if named else "", []).append(named[2] if named else entry)
    return texts


# --- output -----------------------------------------------------------------------------------------------


def _print(results: ZeroShotResults | None, texts: list[TextScore], json_output: bool) -> None:
    from rich.console import Console

    from steplm.cli.tables import print_table
    from steplm.report.zero_shot import document, tasks_table, texts_table

    if json_output:
        print(json.dumps(document(results, texts), indent=1))
        return
    console = Console(highlight=False)
    for table in (None if results is None else tasks_table(results), texts_table(texts)):
        if table is not None:
            print_table(console, table)
    skipped = max((score.result.num_skipped_records for score in texts), default=0)
    if skipped:
        console.print(f"{skipped:,} empty or unusable records were left out", style="yellow")
