"""``steplm plan`` for several devices: FLOPs, traffic and time of a step."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from steplm.cli.plan import five_digits, labeled_spans
from steplm.cli.tables import number_table
from steplm.config import RunConfig
from steplm.cost.traffic import GPUS, LINK_SHARE, Gpu, StepEstimate, estimate_step
from steplm.errors import ConfigError
from steplm.planner.plan import Plan
from steplm.planner.ways import require_known
from steplm.units import binary_unit, format_count, format_seconds, parse_bytes

COLUMNS = ("stage", "steps", "FLOPs", "gather", "reduce", "copies", "compute", "sending", "least", "most")


def show_scale(
    config: RunConfig, plan: Plan, console: Console, *, gpu_name: str, utilization: float, bandwidth: str | None
) -> dict[str, Any]:
    """Print the estimate, unless the console writes to stderr, and return it for JSON output."""
    gpu = choose_gpu(gpu_name, bandwidth)
    steps = [estimate_step(config, plan.shape, phase, gpu, utilization=utilization) for phase in plan.schedule.phases]
    if not console.stderr:
        _render(plan, console, gpu_name, gpu, utilization, steps)
    return {
        "world_size": config.distributed.world_size,
        "num_shards": config.distributed.num_shards,
        "gpu": {"name": gpu_name, **asdict(gpu), "utilization": utilization, "link_share": LINK_SHARE},
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
        "least_seconds": sum(step.num_steps * step.least_seconds for step in steps),
        "most_seconds": sum(step.num_steps * step.most_seconds for step in steps),
    }


def check_scale(gpu_name: str, utilization: float, bandwidth: str | None) -> None:
    """Check the options of ``show_scale`` before anything is printed.

    Raises:
        ConfigError: as ``choose_gpu``, or the utilization is not a share.
    """
    choose_gpu(gpu_name, bandwidth)
    if not 0 < utilization <= 1:
        raise ConfigError(f"--utilization={utilization:g} is a share of the peak: give a number above 0, at most 1.")


def choose_gpu(name: str, bandwidth: str | None = None) -> Gpu:
    """A GPU by name, optionally with another network bandwidth to other nodes, such as ``25GB`` (per second).

    Raises:
        ConfigError: the name is unknown, or the bandwidth cannot be parsed.
    """
    require_known("--gpu", name, GPUS)
    if bandwidth is None:
        return GPUS[name]
    try:
        num_bytes = parse_bytes(bandwidth.removesuffix("/s"))
    except ValueError as error:
        raise ConfigError(f"--bandwidth: {error}, in bytes per second") from None
    if num_bytes < 2**20:
        raise ConfigError(
            f"--bandwidth {bandwidth} is {num_bytes} bytes per second. With a unit it is, for example, 25GB"
        )
    return replace(GPUS[name], network_bandwidth=float(num_bytes))


def _render(
    plan: Plan, console: Console, gpu_name: str, gpu: Gpu, utilization: float, steps: list[StepEstimate]
) -> None:
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
    least = sum(step.num_steps * step.least_seconds for step in steps)
    most = sum(step.num_steps * step.most_seconds for step in steps)
    console.print()
    console.print(f"a step of each device: FLOPs, {unit} that it sends, seconds")
    console.print(table)
    console.print(
        f"run   {plan.training_flops:.3g} FLOPs; {format_seconds(least)} if sending is hidden, {format_seconds(most)} "
        "if none is"
    )
    console.print(
        f"assumed of {gpu_name}: {utilization:.0%} of {gpu.flops[plan.precision] / 1e12:g} TFLOP/s; {LINK_SHARE:.0%} "
        f"of {gpu.node_bandwidth / 1e9:g} GB/s in a node of {gpu.per_node} and of {gpu.network_bandwidth / 1e9:g} GB/s "
        "from each device to others",
        style="dim",
    )
