"""``steplm plan`` for several devices: FLOPs, traffic and time of a step."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from steplm.cli.hours import HERE, told_fit
from steplm.cli.plan import five_digits, labeled_spans
from steplm.cli.tables import number_table
from steplm.config import RunConfig
from steplm.cost.devices import DEVICES, Device
from steplm.cost.traffic import LINK_SHARE, PER_NODE, StepEstimate, estimate_step
from steplm.errors import ConfigError
from steplm.planner.plan import Plan
from steplm.planner.ways import require_known
from steplm.units import binary_unit, format_count, format_seconds, parse_bytes

COLUMNS = ("stage", "steps", "FLOPs", "gather", "reduce", "copies", "compute", "sending", "least", "most")


def show_scale(
    config: RunConfig,
    plan: Plan,
    console: Console,
    name: str,
    device: Device,
    *,
    utilization: float,
    price: float | None = None,
) -> dict[str, Any]:
    """Print the estimate, unless the console writes to stderr, and return it for JSON output.

    Args:
        name: of the device.
        price: of an hour of one device.
    """
    steps = [
        estimate_step(config, plan.shape, phase, device, utilization=utilization) for phase in plan.schedule.phases
    ]
    least = sum(step.num_steps * step.least_seconds for step in steps)
    most = sum(step.num_steps * step.most_seconds for step in steps)
    device_hours = [seconds / 3600 * config.distributed.world_size for seconds in (least, most)]
    costs = None if price is None else [price * hours for hours in device_hours]
    if not console.stderr:
        _render_steps(plan, console, steps)
        console.print(
            f"run   {plan.training_flops:.3g} FLOPs; {format_seconds(least)} if sending is hidden, "
            f"{format_seconds(most)} if none is"
        )
        if costs is not None:
            console.print("cost  {:,.0f} to {:,.0f}".format(*costs))
        if plan.peak_bytes is not None:
            console.print(told_fit(config.memory.needed_bytes(plan.peak_bytes), device.memory_bytes))
        console.print(_assumptions(config, name, device, utilization), style="dim")
    return {
        "world_size": config.distributed.world_size,
        "num_shards": config.distributed.num_shards,
        "device": {"name": name, **asdict(device), "utilization": utilization, "link_share": LINK_SHARE},
        "training_flops": plan.training_flops,
        "phases": [
            {
                "stage": phase.stage,
                **asdict(step),
                "sent_bytes": step.traffic.total,
                "least_seconds": step.least_seconds,
                "most_seconds": step.most_seconds,
            }
            for phase, step in zip(plan.schedule.phases, steps, strict=True)
        ],
        "least_seconds": least,
        "most_seconds": most,
        "costs": costs,
    }


def choose_device(config: RunConfig, name: str, utilization: float, bandwidth: str | None) -> Device:
    """One of several devices by name, optionally with another network bandwidth, such as ``25GB`` (per second).

    Raises:
        ConfigError: the device or its links are not known, or an option is not in range.
    """
    if name == HERE:
        raise ConfigError(f"--device {HERE} times one device, and this run has {config.distributed.world_size}.")
    require_known("--device", name, DEVICES)
    if not 0 < utilization <= 1:
        raise ConfigError(f"--utilization={utilization:g} is a share of the peak: give a number above 0, at most 1.")
    device = DEVICES[name]
    if bandwidth is not None:
        device = replace(device, network_bandwidth=_bytes_per_second(bandwidth))
    if device.network_bandwidth is None and config.distributed.world_size > PER_NODE:
        raise ConfigError(f"the network of {name} is not known: give the bytes per second of each device, such as "
                          "--bandwidth 25GB.")  # fmt: skip
    return device


def _bytes_per_second(text: str) -> float:
    try:
        num_bytes = parse_bytes(text.removesuffix("/s"))
    except ValueError as error:
        raise ConfigError(f"--bandwidth: {error}, in bytes per second") from None
    if num_bytes < 2**20:
        raise ConfigError(f"--bandwidth {text} is {num_bytes} bytes per second. With a unit it is, for example, 25GB")
    return float(num_bytes)


def _assumptions(config: RunConfig, name: str, device: Device, utilization: float) -> str:
    told = (
        f"assumed of {name}: {utilization:.0%} of {device.flops(config.train.precision) / 1e12:g} TFLOP/s; "
        f"{LINK_SHARE:.0%} of {device.bandwidth_in_node / 1e9:g} GB/s in a node of {PER_NODE}"
    )
    if device.network_bandwidth is None:
        return told
    return f"{told} and of {device.network_bandwidth / 1e9:g} GB/s from each device to others"


def _render_steps(plan: Plan, console: Console, steps: list[StepEstimate]) -> None:
    unit, size = binary_unit(max(step.traffic.total for step in steps))
    gap = 1 if console.width >= 90 else 0
    table = number_table(COLUMNS, gap=gap)
    for label, span in labeled_spans(plan):
        # Phases of a span differ only in the number of steps and in which layers are trained.
        step = steps[span.phases[0].index - 1]
        num_steps = sum(steps[phase.index - 1].num_steps for phase in span.phases)
        traffic = step.traffic
        sent = (traffic.all_gather + traffic.update, traffic.reduce_scatter, traffic.all_reduce)
        seconds = (step.compute_seconds, step.communication_seconds, step.least_seconds, step.most_seconds)
        table.add_row(
            label,
            format_count(num_steps),
            format_count(step.flops),
            *(five_digits(count / size) if count else "" for count in sent),
            *(f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in seconds),
        )
    console.print()
    console.print(f"a step of each device: FLOPs, {unit} that it sends, seconds")
    console.print(table)
