"""``steplm plan --simulate`` and ``--calibrate``: compare the plan with simulated and measured steps."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch
from rich.console import Console

from steplm.cli.plan import labeled_spans
from steplm.cli.tables import titled_table
from steplm.config import RunConfig
from steplm.cost.price import Cost
from steplm.files import write_atomically
from steplm.models.device import resolve_device
from steplm.planner.plan import Plan
from steplm.training.simulate import LIBRARIES, measure_phase, simulate_phase
from steplm.units import format_bytes


def show_simulation(config: RunConfig, plan: Plan, console: Console) -> list[dict[str, Any]]:
    """Print and return the peak of every stage, as planned and as counted on fake tensors."""
    rows, on_host = [], list[str]()
    numbers = ("planned", "simulated", "planned / simulated")
    table = titled_table("steps, simulated on fake tensors", ("stage",), numbers)
    table.add_column("highest in")
    for label, span in labeled_spans(plan):
        phase = span.highest_phase
        with console.status(f"stage {label} of {plan.num_stages}"):
            simulated = simulate_phase(config, phase)
        planned = _planned_in_a_step(plan.cost(phase))
        counted = simulated.total_bytes
        planned_host, counted_host = _host_between_steps(plan.cost(phase)), simulated.instants[0].memory.host_bytes
        if planned_host or counted_host:
            on_host.append(f"stage {label}, host memory between steps: {planned_host:,} bytes planned, "
                           f"{counted_host:,} simulated")  # fmt: skip
        rows.append(
            {
                "stage": phase.stage,
                "phase": phase.index,
                "planned_bytes": planned,
                "simulated_bytes": counted,
                "planned_host_bytes": planned_host,
                "simulated_host_bytes": counted_host,
                "moments": {instant.name: instant.memory.total_bytes for instant in simulated.instants},
            }
        )
        table.add_row(
            label,
            format_bytes(planned) if planned else "unknown",
            format_bytes(counted),
            f"{planned / counted:.2%}" if planned else "",
            simulated.highest.name,
        )
    console.print(table)
    for line in on_host:
        console.print(line)
    return rows


def show_calibration(config: RunConfig, plan: Plan, console: Console) -> dict[str, Any]:
    """Run two steps of the largest stage on the device; print, save and return planned and measured memory."""
    device = resolve_device(config.train.device)
    phases = plan.schedule.phases
    phase = max(phases, key=lambda phase: _planned_in_a_step(plan.cost(phase)) or plan.cost(phase).device_bytes)
    with console.status(f"running two steps of stage {phase.stage} on {device}"):
        held = measure_phase(config, phase, device).highest.memory
    libraries = held.bytes_of("model", LIBRARIES)
    measured = held.total_bytes - libraries
    planned = _planned_in_a_step(plan.cost(phase))
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "counted_by": "the allocator" if device.type == "cuda" else "tensor by tensor",
        "torch": torch.__version__,
        "stage": phase.stage,
        "planned_bytes": planned,
        "measured_bytes": measured,
        "library_bytes": libraries,
        "correction": None if planned is None else measured / planned,
    }
    path = config.run_dir / "calibration.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    console.print(
        f"measured on {record['device']} ({record['counted_by']}): stage {phase.stage} {format_bytes(measured)}"
        + ("" if planned is None else f", planned {format_bytes(planned)}")
    )
    if libraries:
        console.print(f"beside it, in memory.reserve: {format_bytes(libraries)} for workspaces of cuBLAS")
    if planned is not None:
        console.print(f"set memory.correction={measured / planned:.4f} to correct every budget; saved in {path}")
    return record


def _host_between_steps(cost: Cost) -> int:
    """Host memory in use at all times; it includes the tables of 8-bit states if the peak is known."""
    if cost.peak is None:
        return cost.memory.host_bytes
    return cost.peak.instants[-1].memory.host_bytes  # evaluation, with no activations in host memory


def _planned_in_a_step(cost: Cost) -> int | None:
    """The planned peak of a step, without growth and evaluation, which are not measured."""
    if cost.peak is None:
        return None
    left_out = ("growth", "evaluation")
    return max(i.memory.total_bytes for i in cost.peak.instants if i.name not in left_out)
