"""``steplm plan``: the plan as a table, as formulas, or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from steplm.cli.tables import number_table, titled_table
from steplm.config import RunConfig
from steplm.cost.rules import ADAMW
from steplm.cost.terms import OUTER_COMPONENTS
from steplm.cost.traffic import UTILIZATION
from steplm.cost.transfers import NO_TRANSFERS
from steplm.errors import ConfigError, SteplmError
from steplm.planner.auto import load_config
from steplm.planner.plan import Plan, Stage, as_vanilla, save_bytes
from steplm.planner.plan import plan as make_plan
from steplm.planner.shape import FAMILIES
from steplm.schedule import Trained
from steplm.types import HOST, HOST_KINDS, HOST_OPTIMIZER, MemoryEstimate, MemoryTerm, ModelShape, to_json
from steplm.units import binary_unit, format_bytes, format_count, percent

COLUMNS = (
    "stage", "layers", "trained", "frozen", "adapters", "tokens", "weights", "grads", "optim", "state", "peak",
)  # fmt: skip


def show_plan(
    run: str,
    overrides: Sequence[str] = (),
    *,
    as_json: bool = False,
    explain: bool = False,
    simulate: bool = False,
    calibrate: bool = False,
    world_size: int | None = None,
    shard_size: int | None = None,
    device: str | None = None,
    utilization: float | None = None,
    bandwidth: str | None = None,
    price: float | None = None,
) -> None:
    """Plan a run and print it; the options are those of ``steplm plan``."""
    if price is not None and device is None:
        raise ConfigError("--price is for an hour of a device: add --device, e.g. --device h200.")
    sizes = {"world_size": world_size, "shard_size": shard_size}
    given = [f"distributed.{name}={size}" for name, size in sizes.items() if size is not None]
    config = load_config(run, [*overrides, *given])
    plan = make_plan(config, counted_shape(config))
    is_alone = config.distributed.world_size == 1
    if not is_alone:
        from steplm.cli.scale import choose_device, show_scale

        name, share = device or "h100", UTILIZATION if utilization is None else utilization
        one_of_many = choose_device(config, name, share, bandwidth)
    elif utilization is not None or bandwidth is not None:
        raise ConfigError("--utilization and --bandwidth are for several devices: add --world-size.")
    elif device is not None:
        from steplm.cli.hours import check_device, choose_speeds, show_time

        check_device(device, config, plan.shape, again=calibrate)
    console = Console(stderr=as_json, highlight=False)
    epochs_of_sources = _epochs_of_sources(plan, config)
    document = plan_to_json(plan) if as_json else {}
    if epochs_of_sources:
        document["epochs_of_sources"] = epochs_of_sources
    if not as_json:
        _print_plan(plan, config, epochs_of_sources, console, explain=explain)
    if not is_alone:
        document["devices"] = show_scale(config, plan, console, name, one_of_many, utilization=share, price=price)
    elif device is not None:
        speeds = choose_speeds(device, config, console, again=calibrate)
        document["time"] = show_time(config, plan, console, speeds, price=price, explain=explain)
    if simulate:
        from steplm.cli.simulate import show_simulation

        document["simulation"] = show_simulation(config, plan, console)
    if calibrate and device is None:
        from steplm.cli.simulate import show_calibration

        document["calibration"] = show_calibration(config, plan, console)
    if as_json:
        print(json.dumps(document, indent=2))


def _print_plan(
    plan: Plan, config: RunConfig, epochs_of_sources: dict[str, float], console: Console, *, explain: bool
) -> None:
    render_plan(plan, console, config)
    limit = config.data.max_train_tokens
    if limit is not None and plan.total_tokens > limit:
        console.print(f"{plan.total_tokens / limit:.1f} epochs over data.max_train_tokens={format_count(limit)}")
    if epochs_of_sources:
        from steplm.data.mixture import told_epochs

        console.print(told_epochs(epochs_of_sources))
    if explain:
        render_explain(plan, console, config)


def counted_shape(config: RunConfig) -> ModelShape | None:
    """The shape of a model that the planner has no formulas for; otherwise None, without importing torch."""
    if config.model.model_type in FAMILIES:
        return None
    from steplm.models.shape import shape_of

    return shape_of(config.model.hf_config())


def _epochs_of_sources(plan: Plan, config: RunConfig) -> dict[str, float]:
    """The epochs over each source of a mixture whose data are prepared; otherwise empty."""
    if not config.data.weights:
        return {}
    from steplm.data.mixture import epochs
    from steplm.data.prepare import with_prepared_dir
    from steplm.data.tokens import Manifest

    try:
        manifest = Manifest.load(with_prepared_dir(config).prepared_dir)
        return epochs(manifest, config.data.weights, plan.total_tokens)
    except SteplmError:  # a plan needs no data
        return {}


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The values that programs most often need, and the whole plan for ``steplm.types.from_json`` under "plan"."""
    return {
        "model_type": plan.shape.model_type,
        "num_parameters": plan.shape.num_parameters(),
        "precision": plan.precision,
        "layers": list(plan.layers),
        "proved_optimal": plan.proved_optimal,
        "peak_bytes": plan.peak_bytes,
        "vanilla_peak_bytes": plan.vanilla_peak_bytes,
        "host_bytes": plan.host_bytes,
        "peak_model_state_bytes": plan.peak_model_state_bytes,
        "peak_stage": _largest(plan, "peak").index,
        "peak_model_state_stage": _largest(plan, "state").index,
        "vanilla_model_state_bytes": plan.vanilla_model_state_bytes,
        "reduction": plan.reduction,
        "total_tokens": plan.total_tokens,
        "hash": plan.schedule.hash,
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
                "terms": [to_json(term) for term in stage.memory.terms],
                "peak_bytes": None if stage.peak is None else stage.peak.total_bytes,
                "peak_instant": None if stage.peak is None else stage.peak.highest.name,
                "peak_terms": [] if stage.peak is None else [to_json(t) for t in stage.peak.highest.memory.terms],
                "host_bytes": stage.host_bytes,
                "bytes_to_host_per_step": stage.transfers.to_host,
                "bytes_to_device_per_step": stage.transfers.to_device,
            }
            for stage in plan.stages
        ],
        "plan": to_json(plan),
    }


def render_plan(plan: Plan, console: Console, config: RunConfig) -> None:
    """Print a table of the stages, then a line for each peak compared with ordinary pre-training; fits 80 columns."""
    shape = plan.shape
    counts_outer = any(_outer(stage.memory).terms for stage in plan.stages)
    vanilla_state = make_plan(as_vanilla(config), shape).stages[0].memory
    unit, size = binary_unit(plan.peak_bytes or plan.peak_model_state_bytes)
    gap = 1 if console.width >= 90 else 0
    table = number_table(COLUMNS, gap=gap)

    def add_row(
        name: str, layers: str, tokens: str, memory: MemoryEstimate, peak: int | None, style: str | None = None
    ) -> None:
        counts = (_trained_parameters(memory), _frozen_parameters(memory), _adapter_parameters(memory))
        kinds = [memory.bytes_of(kind=kind) for kind in ("weights", "gradients", "optimizer")]
        num_bytes = [*kinds, memory.total_bytes, *([] if peak is None else [peak])]
        table.add_row(
            name,
            layers,
            *(format_count(count) if count else "" for count in counts),
            tokens,
            *(five_digits(number / size) for number in num_bytes),
            style=style,
        )

    spans = labeled_spans(plan)
    same_outer = len({_outer(span.memory) for _, span in spans}) == 1
    by_peak = max((span for _, span in spans), key=lambda span: span.device_bytes)
    for label, stage in spans:
        old = stage.num_hidden_layers - stage.num_new_layers
        is_peak = stage is by_peak and len(spans) > 1
        add_row(
            f"{label}{' ◀' if is_peak else ''}",
            f"{old}+{stage.num_new_layers}" if stage.grows else str(stage.num_hidden_layers),
            format_count(stage.tokens),
            stage.memory,
            None if stage.peak is None else stage.peak.total_bytes,
            "bold" if is_peak else None,
        )
        if counts_outer and not same_outer:
            add_row(" emb+head", "", "", _outer(stage.memory), None, "dim")
    table.add_section()
    if counts_outer and same_outer:
        add_row("emb+head", "", "", _outer(by_peak.memory), None, "dim")
    add_row("vanilla", str(shape.num_hidden_layers), "", vanilla_state, plan.vanilla_peak_bytes, "dim")

    _print_header(plan, config, console, unit)
    console.print(table)
    _print_summary(plan, config, console)
    notes = []
    if counts_outer:
        where = "every stage" if same_outer else "the stage above it"
        notes.append(f"emb+head: embeddings, final norm and head, included in {where}")
    else:
        notes.append("embeddings, final norm and head are not counted in the state")
    if len(spans) > 1:
        notes.append("◀: the highest peak")
    if not plan.proved_optimal:
        notes.append("a smaller peak is possible: leave plan.layers out")
    for note in notes:
        console.print(note, style="dim")


def _print_header(plan: Plan, config: RunConfig, console: Console, unit: str) -> None:
    shape, train = plan.shape, config.train
    console.print(
        f"[bold]{shape.model_type}[/], {format_count(shape.num_parameters())} params, "
        f"{shape.num_hidden_layers} layers in {plan.num_stages} stage{'s' if plan.num_stages > 1 else ''}, "
        f"{plan.precision}, {format_count(plan.total_tokens)} tokens; memory in {unit}"
    )
    console.print(
        f"micro-batches of {config.micro_batch_size} × {train.sequence_length} tokens, {config.micro_batches} a step; "
        f"loss in chunks of {train.loss_chunk_size} rows"
    )
    if config.distributed.world_size > 1:
        console.print(f"per device: {devices(config)}")


def labeled_spans(plan: Plan) -> list[tuple[str, Stage]]:
    """The rows of a stage table: one per stage or, if its phases differ in memory, one per group (``1.1``, ``1.2``)."""
    return [
        (str(stage.index) if len(stage.spans) == 1 else f"{stage.index}.{number}", span)
        for stage in plan.stages
        for number, span in enumerate(stage.spans, start=1)
    ]


def devices(config: RunConfig) -> str:
    """Describe the number of devices and how they share the model."""
    size, num_shards = config.distributed.world_size, config.distributed.num_shards
    if num_shards == 1:
        return f"{size} devices, a whole copy on each"
    return f"{size} devices, {'all' if num_shards == size else num_shards} share one copy"


def render_explain(plan: Plan, console: Console, config: RunConfig) -> None:
    """Print every term of every stage, with formula, unit and bytes, for the model state and for the device peak."""
    shape, train = plan.shape, config.train
    rules = dict.fromkeys(
        role.rule
        for phase in plan.schedule.phases
        for role in phase.layers
        if isinstance(role, Trained) and role.rule != ADAMW
    )
    of_devices = (
        ("n", "devices that share one copy", str(config.distributed.num_shards)),
        ("T", "trained parameters gathered at once", ""),
        ("P_outer", "everything outside the layers", ""),
    )
    symbols = titled_table("symbols", ("symbol", "meaning"), ("value",))
    for symbol, meaning, value in (
        ("n_i", f"trained layers{' under AdamW' if rules else ''} in stage i", "below"),
        ("N_{i-1}", "frozen layers in stage i", "below"),
        *((f"n_{rule}", f"trained layers under {rule} in stage i", "below") for rule in rules),
        ("E", "adapter parameters of one frozen layer", "below"),
        ("P_layer", "parameters of one layer", f"{shape.layer_parameters:,}"),
        ("P_embeddings", "parameters of the embeddings", f"{shape.embedding_parameters:,}"),
        ("P_final_norm", "parameters of the final norm", f"{shape.final_norm_parameters:,}"),
        ("P_head", "parameters of the head (0: tied)", f"{shape.head_parameters:,}"),
        ("B", "bytes per parameter", ""),
        ("N", "tokens of a micro-batch", f"{config.micro_batch_size * train.sequence_length:,}"),
        ("d", "hidden size", f"{shape.hidden_size:,}"),
        ("V", "vocabulary", f"{shape.vocab_size:,}"),
        ("C", "rows of logits at once", f"{train.loss_chunk_size:,}"),
        ("w", "bytes of a weight or an activation", "2" if plan.precision == "bf16" else "4"),
        *(of_devices if config.distributed.world_size > 1 else ()),
    ):
        symbols.add_row(symbol, meaning, value)
    console.print(symbols)
    for label, stage in labeled_spans(plan):
        phase = stage.phases[0]
        adapters = _adapter_parameters(stage.memory) // len(phase.adapters) if phase.adapters else 0
        counts = Counter(role.rule for role in phase.layers if isinstance(role, Trained))
        others = "".join(f"n_{rule} = {counts[rule]}, " for rule in rules)
        title = (
            f"stage {label}: n_i = {counts[ADAMW]}, {others}N_{{i-1}} = {len(phase.frozen_layers)}, E = {adapters:,}"
        )
        table = titled_table(f"{title}; model state", ("term", "formula"), ("parameters", "bytes"))
        _add_terms(
            table,
            stage.memory,
            lambda term: (term.formula, f"{term.num_parameters:,}" * (term.num_parameters > 0), f"{term.num_bytes:,}"),
        )
        console.print(table)
        if stage.transfers != NO_TRANSFERS:
            console.print(_transfers(stage))
        if stage.peak is None:
            continue
        highest = stage.peak.highest
        table = titled_table(f'stage {label}: highest at "{highest.name}"', ("term", "formula"), ("bytes",))
        _add_terms(table, highest.memory, lambda term: (term.formula, f"{term.num_bytes:,}"))
        console.print(table)
        table = titled_table(f"stage {label}: instants", ("instant",), ("bytes",))
        for instant in stage.peak.instants:
            style = "bold" if instant is highest else None
            table.add_row(instant.name, f"{instant.memory.total_bytes:,}", style=style)
        console.print(table)
    console.print(
        f"vanilla: all {shape.num_hidden_layers} layers at once, no memory option: "
        f"{plan.vanilla_model_state_bytes:,} bytes of model state"
        + (f", {plan.vanilla_peak_bytes:,} in all" if plan.vanilla_peak_bytes else "")
    )
    console.print(
        f"host memory of a save, while it is written: {save_bytes(plan, config):,} bytes "
        "(a copy of weights, adapters and optimizer states)"
    )
    console.print(
        f"left out: the device's context, libraries and fragmentation, for which memory.reserve "
        f"({format_bytes(config.memory.reserve)}) stands in every budget",
        style="dim",
    )


def _add_terms(table: Table, memory: MemoryEstimate, cells: Callable[[MemoryTerm], tuple[str, ...]]) -> None:
    """Add the terms on the device and their total, then those in host memory and their total."""
    empty = ("",) * (len(table.columns) - 2)
    for on_host, place, total in (
        (False, "on the device", memory.total_bytes),
        (True, "in host memory", memory.host_bytes),
    ):
        terms = [term for term in memory.terms if (term.kind in HOST_KINDS) == on_host]
        if on_host and not terms:
            return
        table.add_section()
        for term in terms:
            kind = "in host memory" if term.kind == HOST else term.kind.replace("_", " ")
            table.add_row(f"{term.component.replace('_', ' ')} {kind}", *cells(term))
        table.add_section()
        table.add_row(f"total {place}", *empty, f"{total:,}", style="bold")


def _print_summary(plan: Plan, config: RunConfig, console: Console) -> None:
    state, highest = _largest(plan, "state"), _largest(plan, "peak")
    if plan.peak_bytes is not None and highest.peak is not None:
        console.print(
            f"peak  [bold]{format_bytes(plan.peak_bytes)}[/] in stage {highest.index} ({highest.peak.highest.name})"
            f"{_against(plan.peak_bytes, plan.vanilla_peak_bytes)}"
        )
    console.print(
        f"state [bold]{format_bytes(plan.peak_model_state_bytes)}[/] in stage {state.index}"
        f"{_against(plan.peak_model_state_bytes, plan.vanilla_model_state_bytes)}"
    )
    if plan.peak_bytes is None:
        console.print(f"peak  unknown: no formula for the activations of {plan.shape.model_type}; --simulate counts it")
    else:
        memory = config.memory
        corrected = f" and memory.correction={memory.correction:g}" if memory.correction != 1.0 else ""
        needed = format_bytes(memory.needed_bytes(plan.peak_bytes))
        console.print(f"device needed, with memory.reserve={format_bytes(memory.reserve)}{corrected}: {needed}")
    if plan.host_bytes:
        console.print(f"host  {format_bytes(plan.host_bytes)} in host memory while training")
    busiest = max(plan.stages, key=lambda stage: stage.transfers.to_host)
    if busiest.transfers != NO_TRANSFERS:
        console.print(_transfers(busiest))


def _transfers(stage: Stage) -> str:
    moved = stage.transfers
    return (
        f"bus   {format_bytes(moved.to_host)} to the host, {format_bytes(moved.to_device)} to the device a step "
        f"(stage {stage.index})"
    )


def _against(num_bytes: int, vanilla_bytes: int | None) -> str:
    if not vanilla_bytes:
        return ""
    if num_bytes == vanilla_bytes:
        return ", as ordinary (vanilla) pre-training"
    return f"; vanilla {format_bytes(vanilla_bytes)}; [bold]{percent(num_bytes / vanilla_bytes - 1)}[/]"


def _largest(plan: Plan, what: str) -> Stage:
    """The stage with the largest model state, or with the highest device peak."""
    return max(plan.stages, key=lambda stage: stage.memory.total_bytes if what == "state" else stage.device_bytes)


def _outer(memory: MemoryEstimate) -> MemoryEstimate:
    return MemoryEstimate(tuple(term for term in memory.terms if term.component in OUTER_COMPONENTS))


def _trained_parameters(memory: MemoryEstimate) -> int:
    """Trained parameters without adapters."""
    kinds = ("optimizer", HOST_OPTIMIZER)
    return sum(t.num_parameters for t in memory.terms if t.kind in kinds and t.component != "adapters")


def _adapter_parameters(memory: MemoryEstimate) -> int:
    return sum(t.num_parameters for t in memory.terms if t.kind == "weights" and t.component == "adapters")


def _frozen_parameters(memory: MemoryEstimate) -> int:
    others = [term for term in memory.terms if term.component not in ("trained_layers", "adapters")]
    weights = sum(term.num_parameters for term in others if term.kind in ("weights", HOST))
    return weights - _trained_parameters(MemoryEstimate(tuple(others)))


def five_digits(value: float) -> str:
    """Format a number in at most five characters (below 100,000), to keep tables narrow."""
    return f"{value:.2f}" if value < 99.995 else f"{value:.1f}" if value < 999.95 else f"{value:.0f}"
