"""Tabulate the planned memory of ordinary training, STEP and each memory option, for five model sizes.

    python benchmarks/memory_table.py               # takes seconds, without PyTorch
    python benchmarks/memory_table.py --simulate    # also counts some rows on fake tensors; takes minutes

Writes results/memory_table/table.json (and simulated.json), and the tables between the markers in docs/memory.md and
results/memory_table/README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

import steplm
from steplm.cli.plan import render_explain
from steplm.config import RunConfig, load_config
from steplm.planner.plan import plan

MODELS = {
    "368M": "llama_368m", "680M": "llama_680m", "1.2B": "llama_1.2b", "3B": "llama_3b", "7B": "llama_7b",
}  # fmt: skip
PAGE = Path("docs/memory.md")
RESULTS = Path("results/memory_table")
BATCH = (
    "train.per_device_train_batch_size=4",
    "train.sequence_length=1024",
    "train.gradient_accumulation_steps=1",
)

Overrides = tuple[str, ...]
OPTIONS: dict[str, Overrides] = {
    "recompute all layers": ("train.gradient_checkpointing=true",),
    "recompute frozen layers": ("train.gradient_checkpointing=frozen",),
    "8-bit optimizer states": ("memory.optimizer_states=8bit",),
    "no master weights": ("memory.master_weights=false",),
    "fused backward": ("memory.fused_backward=true", "optim.max_grad_norm=null"),
    "frozen weights in int8": ("memory.frozen_weights=int8",),
    "frozen weights in NF4": ("memory.frozen_weights=nf4",),
    "frozen weights in host memory": ("memory.offload_frozen=true",),
    "activations in host memory": ("memory.offload_activations=true",),
    "embeddings and head: adapters": ("plan.train_embeddings=adapters",),
    "embeddings and head: stage 1 only": ("plan.train_embeddings=first_stage",),
}
# Of mutually exclusive options, only one is included.
TOGETHER = (
    "recompute all layers",
    "8-bit optimizer states",
    "no master weights",
    "fused backward",
    "frozen weights in NF4",
    "frozen weights in host memory",
    "activations in host memory",
    "embeddings and head: adapters",
)
ALL = tuple(override for name in TOGETHER for override in OPTIONS[name])
HOST_MEMORY = ("memory.offload_optimizer=true", "memory.offload_weights=true")
AUTO = "`method: auto`: Muon, 8-bit states, no master weights"
WAYS: dict[str, Overrides] = {
    "vanilla": ("plan.num_stages=1",),
    AUTO: ("method=auto",),
    "auto + fused backward": ("method=auto", *OPTIONS["fused backward"]),
    "auto + recompute all layers": ("method=auto", *OPTIONS["recompute all layers"]),
    "auto + recompute all layers, trained weights and optimizer in host memory": (
        "method=auto",
        *OPTIONS["recompute all layers"],
        *HOST_MEMORY,
    ),
    **{f"STEP, K={count}": (f"plan.num_stages={count}", "plan.objective=model_state") for count in (2, 3, 4)},
    "STEP, K=3, least peak": ("plan.num_stages=3", "plan.objective=peak"),
    **{f"+ {name}": ("plan.num_stages=3", "plan.objective=peak", *options) for name, options in OPTIONS.items()},
    "all options, vanilla": ("plan.num_stages=1", *ALL),
    **{f"all options, K={count}": (f"plan.num_stages={count}", "plan.objective=peak", *ALL) for count in (3, 6)},
}
SUMMARY = (*list(WAYS)[:5], "STEP, K=3", "STEP, K=3, least peak", "all options, vanilla", "all options, K=3")
WITHOUT = {
    name: ("plan.num_stages=3", "plan.objective=peak", *(each for each in ALL if each not in OPTIONS[name]))
    for name in TOGETHER
}

PAPER = {"368M": 0.423, "680M": 0.422, "1.2B": 0.539}  # model state below vanilla's, STEP (arXiv 2504.04151)
RANKS = (256, 128, 64, 32)
BUDGET = ("7B", 10 * 10**9)
BUDGET_BATCHES = (1, 2, 4, 8)
SIMULATED_MODELS = ("368M", "1.2B")
SIMULATED = ("STEP, K=3, least peak", "+ recompute all layers", "all options, K=3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="count some of the rows on fake tensors too")
    arguments = parser.parse_args()

    table = {
        "command": "python benchmarks/memory_table.py",
        "versions": {"steplm": steplm.__version__, "python": platform.python_version()},
        "batch": BATCH,
        "rows": [row for model in MODELS for row in planned_rows(model, WAYS)],
        "without": [row for model in MODELS for row in planned_rows(model, WITHOUT)],
        "paper": [row for model in PAPER for row in paper_rows(model)],
        "budget": list(budget_rows()),
    }
    write_json(RESULTS / "table.json", table)
    simulated_file = RESULTS / "simulated.json"
    if arguments.simulate:
        write_json(simulated_file, simulated())

    for path, texts in blocks(table, json.loads(simulated_file.read_text())).items():
        page = path.read_text(encoding="utf-8")
        for marker, text in texts.items():
            page = with_block(page, marker, text)
        path.write_text(page, encoding="utf-8")


def configured(model: str, overrides: Iterable[str]) -> RunConfig:
    return load_config(MODELS[model], [*BATCH, *overrides])


def planned_rows(model: str, ways: dict[str, Overrides]) -> list[dict[str, Any]]:
    return [{"model": model, "way": way, **planned(configured(model, options))} for way, options in ways.items()]


def planned(config: RunConfig) -> dict[str, Any]:
    made = plan(config)
    assert made.peak_bytes is not None
    assert made.vanilla_peak_bytes is not None
    stage = max(made.stages, key=lambda stage: stage.device_bytes)
    assert stage.peak is not None
    return {
        "layers": made.layers,
        "num_parameters": made.shape.num_parameters(),
        "model_state_bytes": made.peak_model_state_bytes,
        "model_state_share": made.peak_model_state_bytes / made.vanilla_model_state_bytes,
        "peak_bytes": made.peak_bytes,
        "peak_share": made.peak_bytes / made.vanilla_peak_bytes,
        "peak_stage": stage.index,
        "peak_moment": stage.peak.highest.name,
        "host_bytes": made.host_bytes,
    }


def paper_rows(model: str) -> Iterable[dict[str, Any]]:
    """Model state saved by K = 2, 3, 4, with embeddings, norm and head, and without, as in the paper's formula."""

    def saved(num_stages: int, rank: int, counted: bool) -> float:
        options = (f"plan.num_stages={num_stages}", f"pet.rank={rank}", f"plan.count_embeddings={counted}")
        return plan(configured(model, ["plan.objective=model_state", *options])).reduction

    for counted in (True, False):
        by_rank = {rank: saved(3, rank, counted) for rank in RANKS}
        yield {
            "model": model,
            "paper": PAPER[model],
            "embeddings_counted": counted,
            "saved_by_stages": {str(count): saved(count, 128, counted) for count in (2, 3, 4)},
            "largest_rank_in_3_stages": next((r for r, share in by_rank.items() if met(share, PAPER[model])), None),
        }


def met(saved: float, paper: float) -> bool:
    """Compare with the precision of the paper, whose percentages have one decimal place."""
    return round(saved, 3) >= paper


def budget_rows() -> Iterable[dict[str, Any]]:
    """The fewest stages with which the largest model fits the budget, including the reserve, for each micro-batch."""
    model, budget_bytes = BUDGET
    for batch in BUDGET_BATCHES:
        for count in range(1, 9):
            options = (f"plan.num_stages={count}", f"train.per_device_train_batch_size={batch}")
            config = configured(model, ["plan.objective=peak", *ALL, *options])
            row = planned(config)
            needed_bytes = row["peak_bytes"] + config.memory.reserve
            if needed_bytes <= budget_bytes:
                yield {"model": model, "num_sequences": batch, "needed_bytes": needed_bytes, **row}
                break


def simulated() -> dict[str, Any]:
    """Run a step of the largest stage of some rows on fake tensors."""
    import torch
    import transformers

    from steplm.training.simulate import simulate_phase

    rows = []
    for model in SIMULATED_MODELS:
        for way in SIMULATED:
            config = configured(model, WAYS[way])
            stage = max(plan(config).stages, key=lambda stage: stage.device_bytes)
            assert stage.peak is not None
            counted = simulate_phase(config, stage.highest_phase)
            names = {"simulated_bytes": counted.total_bytes, "simulated_moment": counted.highest.name}
            planned = {"planned_bytes": stage.peak.total_bytes, "planned_moment": stage.peak.highest.name}
            rows.append({"model": model, "way": way, "stage": stage.index, **planned, **names})
            print(rows[-1], flush=True)
    return {
        "command": "python benchmarks/memory_table.py --simulate",
        "versions": {
            "steplm": steplm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "batch": BATCH,
        "rows": rows,
    }


def blocks(table: dict[str, Any], simulated: dict[str, Any]) -> dict[Path, dict[str, str]]:
    """The Markdown for each marker of each page."""
    return {
        PAGE: {
            "explain": f"```text\n{explained()}\n```",
            "shares": render_shares("peak, share of vanilla's", SUMMARY, table["rows"]),
            "simulated": render_simulated(simulated["rows"]),
        },
        RESULTS / "README.md": {
            "without": render_shares("all options, K=3, without", WITHOUT, table["without"]),
            "memory_table": "\n\n".join(render_model(model, table["rows"]) for model in MODELS),
            "paper": render_paper(table["paper"]),
            "budget": render_budget(table["budget"]),
        },
    }


def explained() -> str:
    """What ``steplm plan llama_368m --explain`` prints for the last stage, without the model state."""
    config = load_config("llama_368m")
    made = plan(config)
    console = Console(width=80, file=io.StringIO(), color_system=None)
    render_explain(made, console, config)
    printed = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    first = next(i for i, line in enumerate(printed) if line.startswith(f"stage {made.num_stages}: highest"))
    last = next(i for i, line in enumerate(printed) if line.startswith("vanilla:"))
    return "\n".join(printed[first:last]).strip()


def render_shares(title: str, ways: Iterable[str], rows: list[dict[str, Any]]) -> str:
    """The peak of each model as a share of the vanilla peak."""
    lines = [f"| {title} | {' | '.join(MODELS)} |", "| --- |" + " ---: |" * len(MODELS)]
    for way in ways:
        shares = [f"{row['peak_share']:.1%}" for row in rows if row["way"] == way]
        lines.append(f"| {way} | {' | '.join(shares)} |")
    return "\n".join(lines)


def render_model(model: str, rows: list[dict[str, Any]]) -> str:
    own = [row for row in rows if row["model"] == model]
    lines = [
        f"**{model}** (`{MODELS[model]}`, {own[0]['num_parameters'] / 1e9:.3g}B parameters)",
        "",
        "| | layers | state, GiB | of vanilla's | peak, GiB | of vanilla's | host, GiB | highest at |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in own:
        layers = "+".join(map(str, row["layers"]))
        state = f"{gib(row['model_state_bytes'])} | {row['model_state_share']:.1%}"
        peak = f"{gib(row['peak_bytes'])} | {row['peak_share']:.1%}"
        host = gib(row["host_bytes"]) if row["host_bytes"] else ""
        moment = f"stage {row['peak_stage']}, {row['peak_moment']}"
        lines.append(f"| {row['way']} | {layers} | {state} | {peak} | {host} | {moment} |")
    return "\n".join(lines)


def render_paper(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | embeddings | paper | K=2 | K=3 | K=4 | largest rank that meets it with K=3 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        shares = [
            f"**−{share:.1%}**" if met(share, row["paper"]) else f"−{share:.1%}"
            for share in row["saved_by_stages"].values()
        ]
        counted = "counted" if row["embeddings_counted"] else "left out"
        rank = row["largest_rank_in_3_stages"] or f"none of {', '.join(map(str, RANKS))}"
        lines.append(f"| {row['model']} | {counted} | −{row['paper']:.1%} | {' | '.join(shares)} | {rank} |")
    return "\n".join(lines)


def render_budget(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| micro-batch | K | layers | peak | with the reserve | host memory |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        sizes = [f"{row[name] / 1e9:.2f} GB" for name in ("peak_bytes", "needed_bytes", "host_bytes")]
        layers = row["layers"]
        batch = f"{row['num_sequences']} × 1024"
        lines.append(f"| {batch} | {len(layers)} | {'+'.join(map(str, layers))} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def render_simulated(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | | stage | planned, bytes | at | simulated, bytes | in | difference |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    for row in rows:
        difference = row["planned_bytes"] / row["simulated_bytes"] - 1
        planned = f"{row['planned_bytes']:,} | {row['planned_moment']}"
        counted = f"{row['simulated_bytes']:,} | {row['simulated_moment']}"
        lines.append(f"| {row['model']} | {row['way']} | {row['stage']} | {planned} | {counted} | {difference:+.4%} |")
    return "\n".join(lines)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"


def with_block(page: str, marker: str, text: str) -> str:
    """The page with ``text`` between ``<!-- marker -->`` and ``<!-- /marker -->``."""
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    if not re.search(pattern, page, flags=re.DOTALL):
        raise SystemExit(f"the page has no <!-- {marker} --> … <!-- /{marker} -->")
    return re.sub(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
