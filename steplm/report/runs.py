"""The documents of a run, finished or not, and a table that compares several runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.config import RunConfig, load_written_config
from steplm.errors import SteplmError
from steplm.planner.plan import Plan
from steplm.report.documents import Summary, read_document, read_events, read_plan
from steplm.units import format_bytes, format_count, format_seconds, percent

if TYPE_CHECKING:
    from rich.console import Console

NOT_YET = "–"


@dataclass(frozen=True)
class RunRecord:
    """One run's documents; ``summary`` is ``None`` while the run is unfinished."""

    label: str
    config: RunConfig
    plan: Plan
    events: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None = None

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind (see ``steplm.training.metrics``), in order."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def training_losses(self) -> list[tuple[int, float, int]]:
        """(tokens seen, mean training loss since the previous point, stage), at about equal token intervals.

        The last log line of a stage may average only a few steps, which is noisier; it is merged into the point before.
        """
        events = self.events_of("train")
        spans = [event["tokens_seen"] for event in events]
        spans = [after - before for before, after in pairwise([0, *spans])]
        usual = statistics.median(spans) if spans else 0
        points: list[tuple[int, float, int]] = []
        last_span = 0
        for event, span in zip(events, spans, strict=True):
            tokens, loss, stage = event["tokens_seen"], event["loss"], event["stage"]
            if points and points[-1][2] == stage and span < usual / 2:
                loss = (points.pop()[1] * last_span + loss * span) / (last_span + span)
                span += last_span
            points.append((tokens, loss, stage))
            last_span = span
        return points

    @property
    def measured_model_state_bytes(self) -> int | None:
        """The largest total measured at the start of a stage."""
        return max((event["measured_bytes"]["total"] for event in self.events_of("stage_start")), default=None)

    @property
    def validation_perplexity(self) -> float | None:
        """Perplexity of the exported model; before the run ends, of the latest evaluation."""
        if self.summary is not None:
            return self.summary["validation_perplexity"]
        evaluations = self.events_of("eval")
        return evaluations[-1]["perplexity"] if evaluations else None

    @property
    def tokens_seen(self) -> int:
        return max((event.get("tokens_seen", 0) for event in self.events), default=0)

    @property
    def elapsed_seconds(self) -> float | None:
        if self.summary is not None:
            return self.summary["elapsed_seconds"]
        return max((event["elapsed_seconds"] for event in self.events_of("train")), default=None)

    @property
    def median_tokens_per_second(self) -> float | None:
        """Median over the logged training intervals, which exclude evaluation and checkpoints."""
        speeds = [event["tokens_per_second"] for event in self.events_of("train")]
        return statistics.median(speeds) if speeds else None


def load_run(run_dir: str | Path, label: str | None = None) -> RunRecord:
    """Read ``plan.json``, ``config.yaml``, ``metrics.jsonl`` and ``summary.json`` of a run directory.

    Args:
        label: the run's name in tables and figures; default: the configuration's ``name``.

    Raises:
        SteplmError: the folder is not a run directory, or the run cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "plan.json").is_file():
        raise SteplmError(f"{run_dir} is not a run directory: it has no plan.json", path=str(run_dir))
    config = load_written_config(run_dir / "config.yaml")
    plan, stages = read_plan(run_dir / "plan.json", config)
    return RunRecord(
        label=label or config.name,
        config=config,
        plan=plan,
        events=tuple(read_events(run_dir / "metrics.jsonl", stages)),
        summary=read_document(Summary, run_dir / "summary.json"),
    )


# Heading -> text of a run's cell. The first column is text, the others are numbers.
# Headings are short so that the table fits an 80-column terminal; CAPTION explains them.
COLUMNS: dict[str, Callable[[RunRecord], str]] = {
    "method": lambda run: run.label,
    "layers": lambda run: "+".join(map(str, run.plan.layers)),
    "planned": lambda run: format_bytes(run.plan.peak_model_state_bytes),
    "measured": lambda run: _or_not_yet(run.measured_model_state_bytes, format_bytes),
    "saved": lambda run: percent(-run.plan.reduction) if run.plan.reduction else NOT_YET,
    "ppl": lambda run: _or_not_yet(run.validation_perplexity, "{:.2f}".format),
    "tokens": lambda run: format_count(run.tokens_seen),
    "tok/s": lambda run: _or_not_yet(run.median_tokens_per_second, "{:,.0f}".format),
    "time": lambda run: _or_not_yet(run.elapsed_seconds, format_seconds),
}
CAPTION = (
    "planned, measured: peak bytes of model state. saved: against vanilla's. ppl: validation perplexity. "
    "tok/s: median while training. time: with evaluation and checkpoints."
)


def _or_not_yet(value: Any, write: Callable[[Any], str]) -> str:
    return NOT_YET if value is None else write(value)


def render_rich(records: Iterable[RunRecord], console: Console) -> None:
    """Print a table with one row per run on a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for record in records:
        # Text, because rich would parse brackets in a label as markup
        table.add_row(*(Text(write(record)) for write in COLUMNS.values()))
    console.print(table)
    console.print(CAPTION, style="dim")
