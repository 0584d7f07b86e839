"""Measure the quality cost of each memory option: train a recipe with and without it, on the same tokens.

    python benchmarks/memory_quality.py --tokens 500k --seeds 0 1 --threads 1

Trains the runs one after the other; started again, it resumes. Writes results/memory_quality/README.md and
results.json. STEPLM_DATA is the folder of the recipe's text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from steplm import load_config, plan, train
from steplm.training.metrics import read_metrics

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "8-bit optimizer states": ("memory.optimizer_states=8bit",),
    "no master weights": ("memory.master_weights=false",),
    "frozen weights int8": ("memory.frozen_weights=int8",),
    "frozen weights NF4": ("memory.frozen_weights=nf4",),
    "adapters on embeddings and head": ("plan.train_embeddings=adapters",),
    "all of them, NF4, fused backward": (
        "memory.optimizer_states=8bit",
        "memory.master_weights=false",
        "memory.frozen_weights=nf4",
        "plan.train_embeddings=adapters",
        "memory.fused_backward=true",
        "optim.max_grad_norm=null",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="corpus_10m")
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/memory_quality"))
    parser.add_argument("--output", type=Path, default=Path("results/memory_quality"))
    arguments = parser.parse_args()

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in OPTIONS}
    for seed in arguments.seeds:
        for name, options in OPTIONS.items():
            rows[name].append(one_run(arguments, name, options, seed))
            write(arguments, rows)


def one_run(arguments: argparse.Namespace, name: str, options: tuple[str, ...], seed: int) -> dict[str, Any]:
    folder = "".join(letter if letter.isalnum() else "_" for letter in name)
    run_dir = arguments.runs / f"{folder}-seed{seed}"
    overrides = [
        f"output_dir={run_dir}",
        f"seed={seed}",
        f"plan.total_tokens={arguments.tokens}",
        "plan.objective=model_state",  # as in the paper, so that stages have the same layers in every run
        "eval.eval_steps=1_000_000",
        "train.save_steps=1_000_000",
        "log.progress=lines",
        *([f"train.num_threads={arguments.threads}"] if arguments.threads else []),
    ]
    plain = load_config(arguments.recipe, overrides)
    layers = list(plan(plain).layers)
    result = train(load_config(arguments.recipe, [*overrides, f"plan.layers={layers}", *options]))
    start = read_metrics(run_dir / "metrics.jsonl", "stage_start")
    assert result.validation_loss is not None
    return {
        "seed": seed,
        "layers": layers,
        "validation_loss": result.validation_loss,
        "perplexity": math.exp(result.validation_loss),
        "model_state_bytes": max(event["measured_bytes"]["total"] for event in start),
        "packing_errors": [event["relative_rms_error"] for event in read_metrics(run_dir / "metrics.jsonl", "pack")],
        "tokens": result.plan.total_tokens,
    }


def write(arguments: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    done = {name: runs for name, runs in rows.items() if runs}
    document = {
        "recipe": arguments.recipe,
        "torch": torch.__version__,
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores",
        "command": f"python benchmarks/memory_quality.py --recipe {arguments.recipe} --tokens {arguments.tokens} "
        f"--seeds {' '.join(map(str, arguments.seeds))}",
        "options": {name: {"overrides": OPTIONS[name], "runs": runs} for name, runs in done.items()},
    }
    (arguments.output / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    plain = [run["validation_loss"] for run in rows["plain"]]
    lines = [
        "# What each memory option costs in quality",
        "",
        f"`{document['command']}` on {document['device']}, torch {torch.__version__}. Validation loss in nats per",
        "token; the difference is paired: the same seed, the same tokens in the same order.",
        "",
        f"| option | model state, MiB | {' | '.join(f'loss, seed {seed}' for seed in arguments.seeds)} "
        "| mean perplexity | difference of loss |",
        "| --- | ---: |" + " ---: |" * (len(arguments.seeds) + 2),
    ]
    for name, runs in done.items():
        losses = [run["validation_loss"] for run in runs]
        difference = statistics.mean(loss - base for loss, base in zip(losses, plain, strict=False))
        cells = [f"{loss:.4f}" for loss in losses] + ["" for _ in range(len(arguments.seeds) - len(losses))]
        perplexity = statistics.mean(run["perplexity"] for run in runs)
        state = max(run["model_state_bytes"] for run in runs) / 2**20
        told = "" if name == "plain" else f"{difference:+.4f}"
        lines.append(f"| {name} | {state:.1f} | {' | '.join(cells)} | {perplexity:.1f} | {told} |")
    (arguments.output / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
