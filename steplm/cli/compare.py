"""``steplm compare``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steplm.cli.afterwards import check_parts, parts, run_parts
from steplm.compare.check import check_folders, check_plans, check_texts, prepare_data
from steplm.compare.display import make_display
from steplm.compare.entries import RunKey, Suite
from steplm.compare.sharing import num_shared
from steplm.compare.suite import read_suite
from steplm.config import changed
from steplm.errors import SteplmError
from steplm.units import format_bytes, format_count


def run_compare(
    source: str | Mapping[str, Any],
    overrides: list[str],
    *,
    jobs: int | None = None,
    dry_run: bool = False,
    report: bool = True,
) -> int:
    """Check everything, run what is not finished, write the report and return the exit code."""
    suite = Suite(read_suite(source, overrides))
    runs = check_plans(suite)
    if dry_run:
        _print_runs(suite, runs)
        for line in parts(suite):
            print(line)
        return 0
    from steplm.training.display import make_display as make_run_display

    progress = suite.run_config(runs[0]).log.progress
    display = make_display(progress)
    display.note(
        f"suite     {suite.config.name}: {len(suite.expected_runs({}))} runs or more, every plan checked", "dim"
    )
    check_texts(suite)
    check_parts(suite)
    configs = prepare_data(suite, runs, make_run_display(progress).prepare)
    check_folders(suite, configs)
    from steplm.compare.runner import Runner, problems_of

    runner = Runner(suite, configs, display, jobs=jobs)
    record = runner.run()
    if runner.stop_signal is not None:
        display.note("stopped; run the same command again to resume")
        return 128 + runner.stop_signal
    try:
        exit_code = run_parts(suite, record, display)
    except SteplmError as error:  # the report is still to be written
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        exit_code = error.exit_code
    if exit_code > 128:
        return exit_code
    if report:
        from steplm.cli.report import show_report

        show_report(suite.directory, None)
    counts = Counter(run.status for run in record.runs)
    listing = ", ".join(f"{count} {status}" for status, count in counts.items())
    display.note(f"suite {record.name!r} in {suite.directory}: {listing}")
    problems = problems_of(record)
    for problem in problems:
        print(problem, file=sys.stderr)
    return max(exit_code, 1 if problems else 0)


def _print_runs(suite: Suite, runs: list[RunKey]) -> None:
    """Print one line per entry: its runs, and the cost of each."""
    from steplm.compare.runner import all_stage_keys

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("entry", no_wrap=True)
    for heading in ("method", "rates", "seeds", "layers", "tokens", "FLOPs", "state"):
        is_list = heading == "rates"  # narrow terminals show one rate per line
        side: Literal["left", "right"] = "left" if heading == "method" else "right"
        table.add_column(heading, justify=side, no_wrap=not is_list, min_width=7 if is_list else None)
    # No plan depends on the prepared data, which may not exist yet.
    configs = {run: changed(suite.run_config(run), {"data.prepared_dir": "prepared"}) for run in runs}
    shared = _shared_with(all_stage_keys(suite, configs))
    for entry in suite.entries.values():
        plan = suite.plan(next(run for run in runs if run.entry == entry.name))
        rates = ", ".join(f"{rate:g}" for rate in entry.grid or suite.possible_rates(entry, {}))
        rates += " …" if len(entry.reachable_rates) > len(entry.grid) else ""
        table.add_row(
            Text(entry.name),
            entry.method,
            rates if entry.rate_of is None else f"of {entry.rate_of}",
            ", ".join(map(str, entry.seeds)),
            "+".join(map(str, plan.layers)),
            format_count(plan.total_tokens),
            format_count(plan.training_flops),
            format_bytes(plan.peak_model_state_bytes),
        )
    console = Console(highlight=False)
    console.print(table)
    for name, stages in shared.items():
        console.print(f"{name} shares stages with {stages}", markup=False)
    expected = suite.expected_runs({})
    flops = sum(suite.plan(run).training_flops for run in expected)
    console.print(
        f"{len(expected)} runs, {format_count(flops)} FLOPs in all, matched on {suite.config.match} "
        f"with {suite.config.baseline}"
    )


def _shared_with(keys: dict[RunKey, tuple[str, ...]]) -> dict[str, str]:
    """For each entry, the first one above it whose runs start with the same stages, and the number of these."""
    shared: dict[str, str] = {}
    for run, ours in keys.items():
        for other, theirs in keys.items():
            if other.entry == run.entry or run.entry in shared:
                break
            if number := num_shared(ours, theirs):
                shared[run.entry] = f"{other.entry}: {number} of {len(ours)} stages"
    return shared
