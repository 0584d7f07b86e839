"""Console output of a run: log lines, with a progress bar below them on a terminal."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from steplm.config import GrowthConfig
from steplm.cost.price import Cost
from steplm.cost.rules import ADAMW
from steplm.planner.plan import Plan
from steplm.schedule import Phase, Trained
from steplm.types import MemoryEstimate, TrainState
from steplm.units import format_bytes, format_count, format_seconds, percent, perplexity_of

if TYPE_CHECKING:
    from steplm.data.prepare import PrepareProgress
    from steplm.training.step import StepReport


class Display:
    """Prints one line per event; silent if ``console`` is quiet. Base class of the other displays."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._plan: Plan | None = None
        self._prepared: tuple[str, int] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)  # paths may contain [brackets]

    def plan(self, plan: Plan) -> None:
        self._plan = plan
        layers = " + ".join(str(n) for n in plan.layers)
        peak = ""
        if plan.peak_bytes and plan.vanilla_peak_bytes:
            peak = f", peak {_against(plan.peak_bytes, plan.vanilla_peak_bytes)}"
        self.console.print(
            f"[bold]plan[/]  {plan.num_stages} stage{'s' * (plan.num_stages > 1)}, layers {layers}, "
            f"{format_count(plan.shape.num_parameters())} parameters, {format_count(plan.total_tokens)} tokens, "
            f"model state {_against(plan.peak_model_state_bytes, plan.vanilla_model_state_bytes)}{peak}"
        )

    def prepare(self, progress: PrepareProgress) -> None:
        """Report data preparation at the start of a phase and at every tenth of it."""
        for note in progress.notes if self._prepared is None else ():
            self.note(f"data  {note}")
        moment = (progress.phase, int(progress.fraction * 10) if progress.num_documents else 0)
        if moment == self._prepared:
            return
        self._prepared = moment
        counts = ""
        if progress.num_documents:
            has_tokens = progress.phase == "tokens"  # a tokenizer is made before there are any
            counts = f"  {progress.num_documents:,} documents"
            counts += f", {format_count(progress.num_train_tokens)} tokens" if has_tokens else ""
            counts += f", {format_bytes(progress.num_text_bytes)}"
            counts += f", {format_count(progress.tokens_per_second)} tok/s" if has_tokens else ""
            if progress.seconds_left:
                counts += f", {format_seconds(progress.seconds_left)} left"
        bad = f", {progress.num_bad_records} bad records" if progress.num_bad_records else ""
        share = f"  {progress.fraction:.0%}" if progress.num_documents else ""
        self.note(f"data  {progress.phase}{share}{counts}{bad}")

    def resumed(self, checkpoint: Path, progress: TrainState) -> None:
        self.note(
            f"resuming from {checkpoint.name}: stage {progress.stage_index}, step {progress.step:,}, "
            f"{format_count(progress.tokens_seen)} tokens seen"
        )

    def phase_start(
        self,
        phase: Phase,
        cost: Cost,
        measured: MemoryEstimate,
        measured_peak_bytes: int | None = None,
        library_bytes: int = 0,
    ) -> None:
        """Print a table of planned and measured bytes; the peak is the dry run's, without library workspaces."""
        table = Table(title=self._title(phase), title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("model state")
        for heading in ("planned bytes", "measured bytes", ""):
            table.add_column(heading, justify="right")
        measured_by_kind = measured.by_kind()
        for name, planned_bytes in cost.memory.by_kind().items():
            measured_bytes = measured_by_kind[name]
            equal = "[green]=[/]" if planned_bytes == measured_bytes else "[red]differs[/]"
            table.add_row(name, f"{planned_bytes:,}", f"{measured_bytes:,}", equal)
        if measured_peak_bytes is not None and cost.peak is not None:
            planned_bytes = cost.peak.highest_in_a_pass.memory.total_bytes
            share = f"{measured_peak_bytes / planned_bytes:.1%}"
            table.add_row("peak of a dry run", f"{planned_bytes:,}", f"{measured_peak_bytes:,}", share)
            if library_bytes:
                table.add_row("and cuBLAS", "", f"{library_bytes:,}", "")
        self.console.print(table)

    def _title(self, phase: Phase) -> str:
        parts = [f"{phase.num_hidden_layers} layers"]
        if phase.new_layers:
            parts.append(f"{len(phase.new_layers)} new")
        rules = Counter(role.rule for role in phase.layers if isinstance(role, Trained))
        for rule, count in rules.items():
            number = "all" if count == phase.num_hidden_layers else str(count)
            parts.append(f"{number} trained" + (f" by {rule}" if rule != ADAMW else ""))
        for rank, count in Counter(adapter.rank for adapter in phase.adapters.values()).items():
            parts.append(f"LoRA rank {rank} on {count}")
        return f"stage {self._of(phase.stage)}: {', '.join(parts)}"

    def _of(self, stage: int) -> str:
        return f"{stage}/{self._plan.num_stages}" if self._plan else str(stage)

    def _memory(self, report: StepReport) -> str:
        if report.peak.peak_allocated_bytes is None or self._plan is None:
            return str(report.peak)  # covers the whole process including libraries, which has no planned value
        cost = self._plan.cost(report.phase)
        what = "planned" if cost.peak is not None else "state planned"
        return f"{report.peak} ({what} {format_bytes(cost.device_bytes)})"

    def _left(self, report: StepReport) -> str:
        """Time left for the remaining tokens of the whole plan, at the current speed."""
        if self._plan is None or report.tokens_per_second <= 0:
            return ""
        tokens_left = self._plan.total_tokens - report.progress.tokens_seen
        return f"left {format_seconds(tokens_left / report.tokens_per_second)}"

    def step(self, report: StepReport) -> None:
        progress, result = report.progress, report.result
        self.console.print(
            f"stage {self._of(progress.stage_index)}  step {progress.step:,}/{report.num_steps:,}  "
            f"loss {result.loss:.3f}  ppl {perplexity_of(result.loss):.1f}  "
            f"{''.join(f'{name} {loss:.3f}  ' for name, loss in report.source_losses.items())}"
            f"lr {report.learning_rate:.1e}  grad {result.grad_norm:.2f}  "
            f"{format_count(report.tokens_per_second)} tok/s  "
            f"{'' if report.mfu is None else f'mfu {report.mfu:.0%}  '}{self._memory(report)}  "
            f"{self._left(report)}".rstrip()
        )

    def evaluation(self, progress: TrainState, loss: float, perplexity: float) -> None:
        self.console.print(
            f"stage {self._of(progress.stage_index)}  step {progress.step:,}  "
            f"[bold]validation loss {loss:.4f}  ppl {perplexity:.2f}[/]"
        )

    def growth(self, phase: Phase, growth: GrowthConfig, before: float | None, merged: float, grown: float) -> None:
        layer_map = phase.entry.layer_map
        assert layer_map is not None
        if before is not None:
            self.console.print(f"merge   loss {before:.4f} -> {merged:.4f}")
        self.console.print(
            f"growth  {len(layer_map.kept_layers)} -> {layer_map.num_layers} layers "
            f"({phase.entry.operator}, {growth.resolved_position}: new layers "
            f"{', '.join(str(i) for i in layer_map.new_layers)})  loss {merged:.4f} -> {grown:.4f}"
        )

    def restart(self, phase: Phase, before: float | None, merged: float) -> None:
        loss = f"loss {merged:.4f}" if before is None else f"loss {before:.4f} -> {merged:.4f}"
        self.console.print(f"merge   {loss}; fresh adapters in stage {self._of(phase.stage)}")

    def packing(self, fmt: str, error: float, before: float | None, after: float) -> None:
        loss = f"loss {after:.4f}" if before is None else f"loss {before:.4f} -> {after:.4f}"
        self.console.print(f"packing  frozen weights to {fmt}, relative error {error:.2%}  {loss}")

    def finished(self, run_dir: Path, export_dir: Path, loss: float) -> None:
        self.console.print(
            f"[bold green]done[/]  validation loss {loss:.4f}, perplexity {perplexity_of(loss):.2f}  "
            f"model in {escape(str(export_dir))}"
        )


class RichDisplay(Display):
    """Prints events as lines, and steps as one progress bar for the whole run with the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._is_wide = console.width >= 100
        self._progress = Progress(
            # These widths fit in 80 columns, where the peak is omitted because it hardly changes.
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=28)),
            BarColumn(bar_width=12 if self._is_wide else 6),
            TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True, min_width=4)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True, min_width=11)),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, report: StepReport) -> None:
        progress, result = report.progress, report.result
        if self._task is None:
            total = self._plan.total_tokens if self._plan else None
            self._task = self._progress.add_task("", total=total, completed=progress.tokens_seen, numbers="", left="")
        self._progress.update(
            self._task,
            description=f"stage {self._of(progress.stage_index)}  step {progress.step:,}/{report.num_steps:,}",
            completed=progress.tokens_seen,
            numbers=f"loss {result.loss:.3f}  {format_count(report.tokens_per_second)} tok/s"
            + f"  {report.peak}" * self._is_wide,
            left=self._left(report),
        )


def make_display(kind: str) -> Display:
    """Create a display: ``rich``, ``lines``, ``none``, or ``auto`` (rich if stdout is a terminal, else lines)."""
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "lines"
    # In a log, each event stays on one line, whatever width the pipe reports.
    console = Console(quiet=kind == "none", soft_wrap=kind == "lines", highlight=False)
    return RichDisplay(console) if kind == "rich" else Display(console)


def _against(num_bytes: int, vanilla_bytes: int) -> str:
    """Bytes beside those of ordinary pre-training: ``2.88 MiB (vanilla 3.51 MiB, −17.9%)``."""
    if num_bytes == vanilla_bytes:
        return f"{format_bytes(num_bytes)} (as vanilla)"
    change = percent(num_bytes / vanilla_bytes - 1)
    return f"{format_bytes(num_bytes)} (vanilla {format_bytes(vanilla_bytes)}, {change})"
