"""Compare the planned peak with the simulated one over two grids of small models.

    python benchmarks/memory_grid.py                      # a sample of the first grid, all of the second
    python benchmarks/memory_grid.py --full --minutes 60  # as much of the first as an hour allows

The first grid is batch x sequence x vocabulary x depth x width x stage x checkpointing x accumulation x precision,
in shuffled order, so that any part of it is a fair sample. The second covers the memory options, alone and combined,
and the model families. Writes results/memory_grid/grid.json and README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from steplm import RunConfig, load_config, plan
from steplm.planner.plan import Stage
from steplm.training.simulate import simulate_growth, simulate_phase

AXES: dict[str, tuple[Any, ...]] = {
    "train.per_device_train_batch_size": (1, 3, 8),
    "train.sequence_length": (128, 500, 1024),
    "model.vocab_size": (1000, 32000),
    "model.num_hidden_layers": (3, 6),
    "model.hidden_size": (128, 512),
    "train.gradient_checkpointing": (False, "frozen", "new", True),
    "train.gradient_accumulation_steps": (1, 4),
    "train.precision": ("bf16", "fp32"),
}
SHORT_NAMES = ("batch", "sequence", "vocabulary", "depth", "width", "checkpointing", "accumulation", "precision")

EVERY_OPTION = (
    "memory.optimizer_states=8bit",
    "memory.master_weights=false",
    "memory.fused_backward=true",
    "optim.max_grad_norm=null",
    "memory.frozen_weights=nf4",
    "memory.offload_frozen=true",
    "memory.offload_activations=true",
    "train.gradient_checkpointing=true",
)
GQA = ("model.num_key_value_heads=2",)
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "8-bit states": ("memory.optimizer_states=8bit",),
    "no master weights": ("memory.master_weights=false",),
    "8-bit states, no master weights": ("memory.optimizer_states=8bit", "memory.master_weights=false"),
    "fused backward": ("memory.fused_backward=true", "optim.max_grad_norm=null"),
    "frozen int8": ("memory.frozen_weights=int8",),
    "frozen NF4": ("memory.frozen_weights=nf4",),
    "offload frozen": ("memory.offload_frozen=true",),
    "offload frozen NF4": ("memory.offload_frozen=true", "memory.frozen_weights=nf4"),
    "offload activations": ("memory.offload_activations=true",),
    "offload activations, checkpointing": ("memory.offload_activations=true", "train.gradient_checkpointing=true"),
    "adapters on embeddings": ("plan.train_embeddings=adapters",),
    "embeddings frozen": ("plan.train_embeddings=first_stage",),
    "no clipping": ("optim.max_grad_norm=null",),
    "no adapters": ("pet.method=none",),
    "no freezing": ("method=growth",),
    "within documents": ("data.within_documents=true",),
    "tied embeddings": ("model.tie_word_embeddings=true",),
    "grouped queries": GQA,
    "qwen2": ("model.model_type=qwen2", *GQA),
    "qwen3": ("model.model_type=qwen3", *GQA),
    "mistral": ("model.model_type=mistral", *GQA),
    "every option": EVERY_OPTION,
    "every option, adapters on embeddings": (*EVERY_OPTION, "plan.train_embeddings=adapters"),
    "every option, tied, grouped queries": (*EVERY_OPTION, "model.tie_word_embeddings=true", *GQA),
    "every option, qwen3": (*EVERY_OPTION, "model.model_type=qwen3", *GQA),
    "every option, within documents": (*EVERY_OPTION, "data.within_documents=true"),
}
OPTION_SHAPES: dict[str, tuple[str, ...]] = {
    "small batch": ("train.per_device_train_batch_size=1", "train.sequence_length=128"),
    "large batch": ("train.per_device_train_batch_size=4", "train.sequence_length=1024"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole first grid")
    parser.add_argument("--cases", type=int, default=48, help="of the first grid, without --full; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--output", type=Path, default=Path("results/memory_grid"))
    arguments = parser.parse_args()

    until = time.monotonic() + 60 * arguments.minutes
    cases = list(itertools.product(*AXES.values()))
    random.Random(0).shuffle(cases)
    options = list(itertools.product(OPTIONS, OPTION_SHAPES))
    grids: dict[str, list[dict[str, Any]]] = {"options": [], "shapes": []}
    for option, shape in options:
        if time.monotonic() < until:
            config = configure({}, (*OPTION_SHAPES[shape], *OPTIONS[option]))
            grids["options"] += rows_of(config, {"option": option, "shape": shape})
            write(grids, len(cases), arguments.output)
    for case in cases if arguments.full else cases[: arguments.cases]:
        if time.monotonic() < until:
            names = dict(zip(SHORT_NAMES, case, strict=True))
            grids["shapes"] += rows_of(configure(dict(zip(AXES, case, strict=True))), names)
            write(grids, len(cases), arguments.output)


def configure(case: dict[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    width, depth = case.get("model.hidden_size", 256), case.get("model.num_hidden_layers", 4)
    base = {
        "model": {"intermediate_size": width * 8 // 3, "num_attention_heads": 4, "max_position_embeddings": 1024},
        "plan": {"num_stages": 2, "layers": [depth - depth // 3, depth // 3], "total_tokens": 10**8},
        "pet": {"rank": 16},
        "train": {"device": "cpu"},
    }
    defaults = {"model.hidden_size": width, "model.num_hidden_layers": depth, "model.vocab_size": 8000}
    keys = {**defaults, **case}
    return load_config(base, [*(f"{key}={json.dumps(value)}" for key, value in keys.items()), *overrides])


def rows_of(config: RunConfig, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Compute and print one row per stage."""
    rows = [{**case, "stage": stage.index, **compare(config, stage)} for stage in plan(config).stages]
    for row in rows:
        told = " ".join(f"{value!s:>6}" for key, value in row.items() if key in case or key == "stage")
        planned, simulated = row["planned_bytes"], row["simulated_bytes"]
        where = f"{row['planned_at']} / {row['simulated_at']}"
        print(f"{told}  {planned:>13,} {simulated:>13,}  {planned / simulated:7.4f}  {where}", flush=True)
    return rows


def compare(config: RunConfig, stage: Stage) -> dict[str, Any]:
    assert stage.peak is not None
    phase = stage.highest_phase
    instants = simulate_phase(config, phase).instants
    if phase.entry.kind in ("grow", "merge"):
        instants += simulate_growth(config, phase).instants
    simulated = max(instants, key=lambda instant: instant.memory.total_bytes)
    return {
        "planned_bytes": stage.peak.total_bytes,
        "planned_at": stage.peak.highest.name,
        "simulated_bytes": simulated.memory.total_bytes,
        "simulated_at": simulated.name,
        "ratio": round(stage.peak.total_bytes / simulated.memory.total_bytes, 6),
    }


def write(grids: dict[str, list[dict[str, Any]]], num_cases: int, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = {name: ",\n".join(f"  {json.dumps(row)}" for row in grid) for name, grid in grids.items()}
    body = "".join(f',\n "{name}": [\n{text}\n ]' for name, text in rows.items())
    (output / "grid.json").write_text(f'{{\n "versions": {json.dumps(versions)}{body}\n}}\n')
    lines = [
        "# The planned peak beside the simulated one",
        "",
        "The peak that `steplm plan` computes from formulas, over the peak of the same stage's real step and growth,",
        "run on fake tensors and counted storage by storage. Above 1 the plan asks for more than is held; below, for",
        "less. Evaluations are planned, but not part of the simulation.",
        f"torch {versions['torch']}, transformers {versions['transformers']}; by `python benchmarks/memory_grid.py`.",
        "",
        "| grid | stages compared | lowest ratio | median | highest | within 3% | low by more than 0.1% |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, grid in grids.items():
        ratios = sorted(row["ratio"] for row in grid)
        if ratios:
            within = sum(0.97 <= ratio <= 1.03 for ratio in ratios)
            low = sum(ratio < 0.999 for ratio in ratios)
            lines.append(
                f"| {name} | {len(grid)} | {ratios[0]:.4f} | {ratios[len(ratios) // 2]:.4f} | {ratios[-1]:.4f} "
                f"| {within} | {low} |"
            )
    values = "; ".join(
        f"{short} {', '.join(map(str, AXES[key]))}" for short, key in zip(SHORT_NAMES, AXES, strict=True)
    )
    lines += ["", f"The grid of shapes has {2 * num_cases} stages: {values}. They are taken in a shuffled"]
    lines += [f"order, the first {len(grids['shapes'])} here."]
    for name, grid in grids.items():
        lines += ["", f"## {name.capitalize()}: the lowest and the highest", ""]
        lines += table(sorted(grid, key=lambda row: row["ratio"]), 5)
    lines += ["", "## Options: all", "", *table(grids["options"], len(grids["options"]))]
    (output / "README.md").write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]], num_ends: int) -> list[str]:
    if not rows:
        return []
    shown = rows if len(rows) <= 2 * num_ends else rows[:num_ends] + rows[-num_ends:]
    numbers = ("planned_bytes", "simulated_bytes", "ratio")
    head = [key.removesuffix("_bytes").replace("_", " ") for key in rows[0]]
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(" ---: " if k in numbers else " --- " for k in rows[0]) + "|",
    ]
    for row in shown:
        cells = [f"{v:,}" if k.endswith("_bytes") else f"{v:.4f}" if k == "ratio" else str(v) for k, v in row.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
