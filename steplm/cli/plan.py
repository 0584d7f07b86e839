"""``steplm plan``: the plan as a table, as formulas, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from steplm.config import load_config
from steplm.memory.estimate import estimate_stage
from steplm.memory.terms import OUTER_COMPONENTS
from steplm.planner.plan import plan as make_plan
from steplm.planner.shape import FAMILIES
from steplm.types import MemoryEstimate, Plan, Stage, to_json
from steplm.units import format_bytes, format_count

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def show_plan(run: str, overrides: Sequence[str] = (), *, as_json: bool = False, explain: bool = False) -> None:
    """Plan a run and print it."""
    config = load_config(run, overrides)
    shape = None
    if config.model.model_type not in FAMILIES:
        from steplm.models.shape import shape_of

        shape = shape_of(config.model.hf_config())
    plan = make_plan(config, shape)
    if as_json:
        print(json.dumps(plan_to_json(plan), indent=2))
        return
    console = Console()
    render_plan(plan, console)
    limit = config.data.max_train_tokens
    if limit is not None and plan.total_tokens > limit:
        epochs = plan.total_tokens / limit
        console.print(f"{epochs:.1f} epochs over data.max_train_tokens={format_count(limit)}", highlight=False)
    if explain:
        render_explain(plan, console)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """What programs ask for first, and under "plan" the whole, as ``steplm.types.from_json`` reads it."""
    return {
        "model_type": plan.shape.model_type,
        "num_parameters": plan.shape.num_parameters(),
        "precision": plan.precision,
        "layers": list(plan.layers),
        "proved_optimal": plan.proved_optimal,
        "peak_model_state_bytes": plan.peak_model_state_bytes,
        "peak_stage": _peak_stage(plan).index,
        "vanilla_model_state_bytes": plan.vanilla_model_state_bytes,
        "reduction": plan.reduction,
        "total_tokens": plan.total_tokens,
        "hash": plan.hash,
        "stages": [
            {
                "index": stage.index,
                "num_new_layers": stage.num_new_layers,
                "num_hidden_layers": stage.num_hidden_layers,
                "trained_parameters": _trained_parameters(stage.memory),
                "frozen_parameters": _frozen_parameters(stage.memory),
                "adapter_parameters": _adapter_parameters(stage.memory),
                "scheduled_tokens": stage.scheduled_tokens,
                "tokens": stage.tokens,
                "model_state_bytes": stage.memory.total_bytes,
                "terms": [
                    {
                        "component": term.component,
                        "kind": term.kind,
                        "num_parameters": term.num_parameters,
                        "bytes_per_parameter": term.bytes_per_parameter,
                        "num_bytes": term.num_bytes,
                        "formula": term.formula,
                    }
                    for term in stage.memory.terms
                ],
            }
            for stage in plan.stages
        ],
        "plan": to_json(plan),
    }


def render_plan(plan: Plan, console: Console) -> None:
    """A table of the stages, and the peak against ordinary pre-training in one line; fits 80 columns."""
    shape, peak = plan.shape, _peak_stage(plan)
    counts_outer = any(_outer(stage.memory).terms for stage in plan.stages)
    vanilla = estimate_stage(
        shape, precision=plan.precision, num_new_layers=shape.num_hidden_layers, count_outer=counts_outer
    )
    unit, size = next((unit, size) for unit, size in _UNITS if vanilla.total_bytes >= size)
    gap = 1 if console.width >= 90 else 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, gap, 0, 0), pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in (
        "layers",
        "trained",
        "frozen",
        "adapters",
        "tokens",
        "weights",
        "gradients",
        "optimizer",
        "total",
    ):
        table.add_column(name, justify="right", no_wrap=True)

    def add_row(name: str, layers: str, tokens: str, memory: MemoryEstimate, style: str | None = None) -> None:
        table.add_row(name, layers, *_parameter_cells(memory), tokens, *_byte_cells(memory, size), style=style)

    same_outer = len({_outer(stage.memory) for stage in plan.stages}) == 1
    for stage in plan.stages:
        old = stage.num_hidden_layers - stage.num_new_layers
        is_peak = stage is peak and plan.num_stages > 1
        add_row(
            f"{stage.index}{' ◀' if is_peak else ''}",
            f"{old}+{stage.num_new_layers}" if old else str(stage.num_new_layers),
            format_count(stage.tokens),
            stage.memory,
            "bold" if is_peak else None,
        )
        if counts_outer and not same_outer:
            add_row(" outer", "", "", _outer(stage.memory), "dim")
    table.add_section()
    if counts_outer and same_outer:
        add_row("outer", "", "", _outer(peak.memory), "dim")
    add_row("vanilla", str(shape.num_hidden_layers), "", vanilla, "dim")

    console.print(
        f"[bold]{shape.model_type}[/], {format_count(shape.num_parameters())} parameters, "
        f"{shape.num_hidden_layers} layers in {plan.num_stages} stage{'s' if plan.num_stages > 1 else ''}, "
        f"{plan.precision}, {format_count(plan.total_tokens)} tokens; memory in {unit}",
        highlight=False,
    )
    console.print(table)
    console.print(_summary(plan), highlight=False)
    if counts_outer:
        where = "a part of every stage above" if same_outer else "a part of the stage above it"
        console.print(f"outer: embeddings, final norm and head, {where}", style="dim", highlight=False)
    else:
        console.print("embeddings, final norm and head are not counted", style="dim", highlight=False)
    if not plan.proved_optimal:
        console.print("a smaller peak is possible: leave plan.layers out", style="dim", highlight=False)
    console.print("activations and workspace come on top", style="dim", highlight=False)


def render_explain(plan: Plan, console: Console) -> None:
    """Every term of every stage: formula, parameters, bytes."""
    shape = plan.shape
    symbols = Table(title="symbols", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    symbols.add_column("symbol")
    symbols.add_column("meaning")
    symbols.add_column("value", justify="right")
    for symbol, meaning, value in (
        ("n_i", "layers trained as a whole in stage i", "below"),
        ("N_{i-1}", "frozen layers in stage i", "below"),
        ("E", "adapter parameters of one frozen layer", "below"),
        ("P_layer", "parameters of one layer", f"{shape.layer_parameters:,}"),
        ("P_embeddings", "parameters of the embeddings", f"{shape.embedding_parameters:,}"),
        ("P_final_norm", "parameters of the final norm", f"{shape.final_norm_parameters:,}"),
        ("P_head", "parameters of the head (0: tied)", f"{shape.head_parameters:,}"),
        ("B", "bytes per parameter, per rank, unsharded", ""),
    ):
        symbols.add_row(symbol, meaning, value)
    console.print(symbols)
    for stage in plan.stages:
        counts = [_layers(stage, component, shape.layer_parameters) for component in ("new_layers", "frozen_layers")]
        adapters = _adapter_parameters(stage.memory) // len(stage.adapters.layers) if stage.adapters else 0
        table = Table(
            title=f"stage {stage.index}: n_i = {counts[0]}, N_{{i-1}} = {counts[1]}, E = {adapters:,}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("term")
        table.add_column("formula")
        table.add_column("parameters", justify="right")
        table.add_column("bytes", justify="right")
        for term in stage.memory.terms:
            name = f"{term.component.replace('_', ' ')} {term.kind}"
            table.add_row(name, term.formula, f"{term.num_parameters:,}", f"{term.num_bytes:,}")
        table.add_section()
        table.add_row("total", "", "", f"{stage.memory.total_bytes:,}", style="bold")
        console.print(table)
    console.print(
        f"vanilla: all {shape.num_hidden_layers} layers at once, {plan.vanilla_model_state_bytes:,} bytes",
        highlight=False,
    )
    console.print("left out: activations, logits, workspace, the device's own context", style="dim", highlight=False)


def _summary(plan: Plan) -> str:
    peak, vanilla = plan.peak_model_state_bytes, plan.vanilla_model_state_bytes
    if peak == vanilla:
        return f"peak [bold]{format_bytes(peak)}[/] of model states, as ordinary (vanilla) pre-training"
    sign = "-" if plan.reduction > 0 else "+"
    return (
        f"peak [bold]{format_bytes(peak)}[/] in stage {_peak_stage(plan).index}; "
        f"vanilla {format_bytes(vanilla)}; [bold]{sign}{abs(plan.reduction):.1%}[/]"
    )


def _peak_stage(plan: Plan) -> Stage:
    return max(plan.stages, key=lambda stage: stage.memory.total_bytes)


def _outer(memory: MemoryEstimate) -> MemoryEstimate:
    return MemoryEstimate(tuple(term for term in memory.terms if term.component in OUTER_COMPONENTS))


def _trained_parameters(memory: MemoryEstimate) -> int:
    """Without adapters."""
    return sum(t.num_parameters for t in memory.terms if t.kind == "gradients" and t.component != "adapters")


def _adapter_parameters(memory: MemoryEstimate) -> int:
    return sum(t.num_parameters for t in memory.terms if t.kind == "weights" and t.component == "adapters")


def _frozen_parameters(memory: MemoryEstimate) -> int:
    weights = sum(term.num_parameters for term in memory.terms if term.kind == "weights")
    return weights - _adapter_parameters(memory) - _trained_parameters(memory)


def _layers(stage: Stage, component: str, layer_parameters: int) -> int:
    return sum(
        t.num_parameters // layer_parameters
        for t in stage.memory.terms
        if (t.component, t.kind) == (component, "weights")
    )


def _parameter_cells(memory: MemoryEstimate) -> list[str]:
    counts = (_trained_parameters(memory), _frozen_parameters(memory), _adapter_parameters(memory))
    return [format_count(count) if count else "" for count in counts]


def _byte_cells(memory: MemoryEstimate, size: int) -> list[str]:
    kinds = [memory.bytes_of(kind=kind) for kind in ("weights", "gradients", "optimizer")]
    return [_five_digits(num_bytes / size) for num_bytes in (*kinds, memory.total_bytes)]


def _five_digits(value: float) -> str:
    """At most five characters below 100,000, so that the table stays narrow."""
    return f"{value:.2f}" if value < 99.995 else f"{value:.1f}" if value < 999.95 else f"{value:.0f}"
