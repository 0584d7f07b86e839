"""``steplm fit``: what fits a budget, as a table or as JSON, and what would fit if a plan does not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from steplm.cli.hours import HERE, choose_speeds
from steplm.cli.plan import counted_shape
from steplm.cli.tables import number_table
from steplm.config import read_values
from steplm.cost.devices import DEVICES
from steplm.errors import ConfigError, OverBudget, PlanInfeasible
from steplm.planner.auto import MICRO_BATCH, load_config, smallest_sizes
from steplm.planner.fit import Alternative, FitResult, fit, suggestions
from steplm.planner.ladder import RUNGS
from steplm.planner.ways import VARY, require_known
from steplm.units import binary_unit, format_bytes, format_count, format_seconds, parse_bytes, wrapped

STAGES_LOSS = (
    "stages with frozen layers; loss: +0.10 for 2 or 3 (0.66M, 15 tokens per parameter, three seeds), +0.14 and +0.20 "
    "(11M, 3.4 tokens per parameter, three seeds)"
)


def show_fit(
    run: str,
    overrides: Sequence[str] = (),
    *,
    budget: str | None = None,
    maximize: str | None = None,
    vary: str = ",".join(VARY),
    show: int = 3,
    as_json: bool = False,
    device: str | None = None,
    output: Path | None = None,
) -> None:
    """Find the ways to fit the budget and print them; the options are those of ``steplm fit``."""
    if budget is None:
        if device is not None:
            require_known("--device", device, (*DEVICES, HERE))
        if device not in DEVICES:
            raise ConfigError(f"give --budget, e.g. 24GiB, or a --device whose memory is known: {', '.join(DEVICES)}.")
        budget = f"{DEVICES[device].memory_bytes // 10**9}GB"
    try:
        budget_bytes = parse_bytes(budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from None
    if budget_bytes < 2**20:  # too small for any model, so the unit is probably missing
        raise ConfigError(f"--budget {budget} is {budget_bytes} bytes. With a unit it is, for example, 24GiB")
    names = [name.strip() for name in vary.split(",") if name.strip()]
    overrides, has_auto_batch = _without_auto(run, overrides)
    if has_auto_batch and maximize is None:
        maximize = "batch"
    config = load_config(run, overrides)
    if device is not None and config.distributed.world_size > 1:
        raise ConfigError("--device estimates the time of one device: leave it out, or distributed.world_size.")
    console = Console(stderr=True, highlight=False)
    speeds = None if device is None else choose_speeds(device, config, console)
    with console.status("trying combinations"):  # shown on a terminal only
        result = fit(config, budget_bytes, maximize=maximize, vary=names, shape=counted_shape(config), speeds=speeds)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    else:
        render_fit(
            result, Console(highlight=False), run, overrides, budget, show, world_size=config.distributed.world_size
        )
    if output is not None:
        from steplm.report.fit_figure import fit_figure

        fit_figure(result, output)
        console.print(f"wrote {output}", soft_wrap=True, markup=False)


def what_fits(error: OverBudget, run: str, overrides: Sequence[str]) -> PlanInfeasible:
    """The error of a plan that does not fit ``plan.budget``, with changes that would make it fit."""
    config = load_config(run, _without_auto(run, overrides)[0])
    more = suggestions(config, error.budget_bytes, counted_shape(config))
    return PlanInfeasible(f"{error.fact}\n{more}", **error.details)


def _without_auto(run: str, overrides: Sequence[str]) -> tuple[list[str], bool]:
    """Overrides that replace ``auto`` by the smallest size, and whether the micro-batch is ``auto``."""
    sizes = smallest_sizes(read_values(run, overrides))
    return [*overrides, *(f"train.{key}={size}" for key, size in sizes.items())], MICRO_BATCH in sizes


def render_fit(
    result: FitResult,
    console: Console,
    run: str,
    overrides: Sequence[str],
    budget: str,
    show: int,
    *,
    world_size: int = 1,
) -> None:
    """Print the answer, the alternatives, and commands from the gentlest to the harshest; fits 80 columns."""
    best = result.best
    budgets = f"{format_bytes(result.budget_bytes)} ({format_bytes(result.reserve_bytes)} reserve)"
    how = f"with {' '.join(best.overrides)}" if best.overrides else "as written"
    fits = f"fits in {budgets}: {how}"
    if result.maximize is not None:
        fits = f"largest {result.maximize} in {budgets}: {best.value:,}"
    for line in wrapped(fits, console.width):
        console.print(line, style="bold", markup=False)
    console.print(f"{format_count(best.num_parameters)} parameters, peak {format_bytes(best.peak_bytes)}")
    console.print()
    console.print(_table(result, gap=2 if console.width >= 100 else 1))
    console.print()
    for line in _legend(result.alternatives, console.width):
        console.print(line, style="dim", markup=False)
    if result.at_limit:
        console.print("the search stops at this value: more may fit", style="dim")
    for row in _shown(result, show):
        size = [] if result.maximize is None else [f"{result.maximize} {row.value:,}"]
        what = ", ".join([*size, f"layers {'+'.join(map(str, row.layers))}", *row.options])
        time = "" if row.seconds is None else f", {format_seconds(row.seconds)}"
        console.print()
        for line in wrapped(f"{what}: peak {format_bytes(row.peak_bytes)}{time}", console.width - 2):
            console.print(f"# {line}", style="dim", markup=False)
        for line in _command(run, overrides, row, budget, console.width, world_size):
            console.print(line, markup=False, soft_wrap=True)


def _shown(result: FitResult, count: int) -> list[Alternative]:
    """``count`` of the rows, from the first, which is the answer, to the last."""
    rows = result.alternatives
    if count >= len(rows) or count < 2:
        return list(rows[:count])
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def _table(result: FitResult, *, gap: int) -> Table:
    numbers = _numbers(result.alternatives)
    unit, size = binary_unit(max(row.peak_bytes for row in result.alternatives))
    on_host = max(row.host_bytes for row in result.alternatives) > 0
    has_state = not (on_host and result.maximize)  # to fit 80 columns
    largest_sizes = [] if result.maximize is None else [result.maximize, "params"]
    sizes = [f"peak {unit}", *(["state"] * has_state), *(["host"] * on_host)]
    times = [] if result.best.seconds is None else ["time"]
    columns = [*largest_sizes, "layers", "rank", "options", *sizes, "FLOPs", *times]
    table = number_table(columns, words=("layers", "options"), gap=gap)
    for row in result.alternatives:
        value = [f"{row.value:,}", format_count(row.num_parameters)] if row.value is not None else []
        ratio = row.flops / result.best.flops
        table.add_row(
            *value,
            "+".join(map(str, row.layers)),
            "" if row.rank is None else str(row.rank),
            _ranges([numbers[name] for name in row.options]) or "none",
            f"{row.peak_bytes / size:.2f}",
            *([f"{row.model_state_bytes / size:.2f}"] * has_state),
            *([f"{row.host_bytes / size:.2f}" if row.host_bytes else ""] * on_host),
            f"{row.flops:.2e}" if row is result.best else f"×{ratio:.2f}" if ratio >= 0.1 else f"×{ratio:.2g}",
            *(() if row.seconds is None else (format_seconds(row.seconds),)),
            style="bold" if row is result.best else None,
        )
    return table


def _legend(rows: Sequence[Alternative], width: int) -> list[str]:
    """What each number in the options column stands for, and what that option costs."""
    lines = []
    numbers = _numbers(rows)
    for rung in RUNGS:
        if rung.name in numbers:
            told = (("time", rung.time), ("quality", rung.quality), ("loss", rung.loss))
            costs = [f"{word}: {cost}" for word, cost in told if cost]
            text = f"{numbers[rung.name]:>{len(str(len(numbers)))}} {rung.name}; {'; '.join(costs)}"
            lines += wrapped(text, width, indent=1 + len(str(len(numbers))))
    if any(row.rank is not None for row in rows):
        lines += wrapped(STAGES_LOSS, width)
    return [*lines, *wrapped("options are added to those in the file; FLOPs include recomputation", width)]


def _numbers(rows: Sequence[Alternative]) -> dict[str, int]:
    used = {name for row in rows for name in row.options}
    return {name: number for number, name in enumerate((r.name for r in RUNGS if r.name in used), start=1)}


def _ranges(numbers: Sequence[int]) -> str:
    """``[1, 2, 3, 5] -> "1-3,5"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _command(
    run: str, overrides: Sequence[str], best: Alternative, budget: str, width: int, world_size: int
) -> list[str]:
    """The lines of one shell command; overrides of the alternative replace given ones of the same key."""
    changed = {override.partition("=")[0] for override in best.overrides}
    kept = [override for override in overrides if override.partition("=")[0] not in {*changed, "plan.budget"}]
    program = "steplm" if world_size == 1 else f"torchrun --standalone --nproc-per-node {world_size} -m steplm"
    lines = [f"{program} train {shlex.quote(run)}"]
    added = [override for override in best.overrides if not override.startswith("plan.budget=")]
    for word in [*kept, *added, f"--budget {budget}"]:
        quoted = word if word.startswith("--budget") else shlex.quote(word)
        if len(lines[-1]) + len(quoted) + 3 > width:
            lines[-1] += " \\"
            lines.append("    " + quoted)
        else:
            lines[-1] += " " + quoted
    return lines
