"""``steplm plan --device``: seconds per step, tokens per second, hours and money, by stage."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from steplm.cli.tables import number_table, titled_table
from steplm.config import RunConfig, changed, token_budget
from steplm.cost.activations import is_modeled
from steplm.cost.devices import DEVICES
from steplm.cost.seconds import Speeds, StepSeconds, published_speeds
from steplm.cost.work import KINDS
from steplm.errors import ConfigError
from steplm.planner.hours import StageTime, stage_times
from steplm.planner.plan import Plan, as_vanilla
from steplm.planner.plan import plan as make_plan
from steplm.planner.ways import require_known
from steplm.types import ModelShape
from steplm.units import format_bytes, format_count, format_seconds

HERE = "here"  # this machine
LITTLE = 0.1  # share of a step


def check_device(name: str, config: RunConfig, shape: ModelShape, *, again: bool) -> None:
    """Check, before anything is printed, that the time of a run on a device can be estimated.

    Raises:
        ConfigError: the name is unknown, or the family has no formulas.
    """
    require_known("--device", name, (*DEVICES, HERE))
    if again and name != HERE:
        raise ConfigError(f"--calibrate times this machine, which is not {name}: take --device here.")
    if not is_modeled(shape):
        raise ConfigError(
            f"operations of model type {shape.model_type!r} are not known by formula, so its time is not either: "
            "leave --device out.",
            model_type=shape.model_type,
        )


def choose_speeds(name: str, config: RunConfig, console: Console, *, again: bool = False) -> Speeds:
    """The speeds of a device by name; for ``here``, saved measurements, made now if there are none or with ``again``.

    Raises:
        ConfigError: the name is unknown.
    """
    require_known("--device", name, (*DEVICES, HERE))
    if name != HERE:
        return published_speeds(name)
    import torch

    from steplm.models.device import resolve_device
    from steplm.training.speeds import speeds_here

    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    return speeds_here(resolve_device(config.train.device), again=again, note=lambda text: _note(console, text))


def show_time(
    config: RunConfig, plan: Plan, console: Console, speeds: Speeds, *, price: float | None, explain: bool
) -> dict[str, Any]:
    """Print the time of a plan, unless the console writes to stderr, and return it for JSON output."""
    times = stage_times(config, plan, speeds)
    as_ordinary = as_vanilla(changed(config, token_budget(total_tokens=plan.total_tokens)))
    vanilla_times = stage_times(as_ordinary, make_plan(as_ordinary, plan.shape), speeds)
    assert times is not None  # see ``check_device``
    assert vanilla_times is not None
    vanilla = sum(time.seconds for time in vanilla_times)
    if not console.stderr:
        _render(config, plan, console, speeds, times, vanilla, price)
        if explain:
            table = titled_table(f"speeds of {speeds.name}", ("work",), ("a second",))
            for kind, rate in speeds.per_second.items():
                table.add_row(kind, f"{format_count(rate)} {KINDS[kind]}")
            console.print(table)
            for time in times:
                console.print(_terms(time, speeds))
            _note(console, "M: matrix parameters of a layer; q, k, f: widths of queries, keys, feed-forward;")
            _note(console, "S: sequence length; r: rank; P: trained parameters; the others as above")
    seconds = sum(time.seconds for time in times)
    return {
        "device": speeds.name,
        "source": speeds.source,
        "seconds": seconds,
        "vanilla_seconds": vanilla,
        "cost": None if price is None else _cost(seconds, price),
        "stages": [
            {
                "index": time.index,
                "num_steps": time.num_steps,
                "step_seconds": time.step_seconds,
                "tokens_per_second": time.tokens_per_second,
                "seconds": time.seconds,
                "cost": None if price is None else _cost(time.seconds, price),
                "waits_for_launches": time.longest_step.waits_for_launches,
                "host_update_seconds": time.longest_step.host_update,
                "terms": _terms_to_json(time.longest_step, speeds),
            }
            for time in times
        ],
    }


def _render(
    config: RunConfig,
    plan: Plan,
    console: Console,
    speeds: Speeds,
    times: tuple[StageTime, ...],
    vanilla: float,
    price: float | None,
) -> None:
    costs = () if price is None else ("cost",)
    table = number_table(("stage", "layers", "steps", "s/step", "tok/s", "time", *costs))

    def add_row(name: str, layers: str, steps: int, tokens: int, seconds: float, style: str | None = None) -> None:
        cells = [name, layers, f"{steps:,}", f"{seconds / steps:#.3g}".rstrip("."), f"{tokens / seconds:,.0f}"]
        cost = [] if price is None else [f"{_cost(seconds, price):,.2f}"]
        table.add_row(*cells, format_seconds(seconds), *cost, style=style)

    steps, tokens = sum(time.num_steps for time in times), plan.total_tokens
    for time in times:
        add_row(str(time.index), str(time.num_hidden_layers), time.num_steps, time.tokens, time.seconds)
    table.add_section()
    if len(times) > 1:
        add_row("all", "", steps, tokens, sum(time.seconds for time in times), "bold")
    add_row("vanilla", str(plan.shape.num_hidden_layers), steps, tokens, vanilla, "dim")
    console.print()
    where = "this machine" if speeds.name == HERE else speeds.name
    console.print(f"time on {where}, in steps of {format_count(config.step_tokens)} tokens")
    console.print(table)
    if speeds.name in DEVICES and plan.peak_bytes is not None:
        console.print(told_fit(config.memory.needed_bytes(plan.peak_bytes), DEVICES[speeds.name].memory_bytes))
    if any(time.longest_step.waits_for_launches for time in times):
        or_compile = "" if config.train.compile else ", or set train.compile=true"
        _note(console, f"the device waits for kernels to be launched: raise the micro-batch{or_compile}")
    if config.memory.offload_optimizer:
        longest = max((time.longest_step for time in times), key=lambda step: step.host_update)
        cost = "hidden behind the passes on the device"
        # From this many micro-batches a step on, the updates cost little.
        if least := longest.micro_batches_until_host_update_is(LITTLE, config.micro_batches):
            cost = f"{longest.host_update:#.3g} s a step; at most {LITTLE:.0%} of it from {least:,} micro-batches"
            cost += f" (now {config.micro_batches})"
        _note(console, f"CPU updates: {cost}")
    _note(console, f"speeds: {speeds.source}; left out: evaluation, checkpoints, data")


def told_fit(needed: int, memory: int) -> str:
    """Whether this many bytes, with the reserve, fit in the memory of a device, in words."""
    verdict = "fits in" if needed <= memory else "does not fit in"
    return f"{format_bytes(needed)} with the reserve {verdict} its {memory / 1e9:.0f} GB ({format_bytes(memory)})"


def _terms(time: StageTime, speeds: Speeds) -> Table:
    """A table of the work in the longest step of a stage, with the seconds of each kind of work."""
    title = f"stage {time.index}: seconds of a step"
    table = titled_table(title, ("part", "work", "formula"), ("amount", "seconds"))
    for row in _terms_to_json(time.longest_step, speeds):
        amount = f"{format_count(row['amount'])} {row['unit']}"
        table.add_row(row["part"], row["kind"], "; ".join(row["formulas"]), amount, f"{row['seconds']:.3g}")
    table.add_section()
    how = "launches, where they take longer" if time.longest_step.waits_for_launches else ""
    table.add_row("a step", "", how, "", f"{time.longest_step.total:.3g}", style="bold")
    return table


def _terms_to_json(step: StepSeconds, speeds: Speeds) -> list[dict[str, Any]]:
    """One entry for each part of a step and kind of work."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for work, seconds in zip(step.work, step.seconds, strict=True):
        row = rows.setdefault(
            (work.part, work.kind),
            {
                "part": work.part,
                "kind": work.kind,
                "amount": 0.0,
                "unit": KINDS[work.kind],
                "per_second": speeds.per_second[work.kind],
                "seconds": 0.0,
                "formulas": [],
            },
        )
        row["amount"] += work.amount
        row["seconds"] += seconds
        row["formulas"] += [] if work.formula in ("", *row["formulas"]) else [work.formula]
    return list(rows.values())


def _cost(seconds: float, price: float) -> float:
    return seconds / 3600 * price


def _note(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False)
