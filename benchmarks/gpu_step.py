"""Measure tokens per second and model FLOPs utilization of every stage of a run on one GPU, plain and compiled.

    python benchmarks/gpu_step.py --runs corpus_60m llama_368m --compile --output results/gpu_step/steps.json

Steps have one micro-batch of random tokens, and the weights are fresh. Reports the median over steps after the first
few. FLOPs are those of the plan, without recomputation. ``--peak-tflops`` is the data sheet's peak for dense bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from steplm import RunConfig, load_config, plan
from steplm.data.loader import Batch
from steplm.distributed.world import World
from steplm.models.build import DTYPES, hf_config, initial_state
from steplm.models.device import resolve_device
from steplm.planner.plan import Stage
from steplm.planner.shape import shape_from_hf_config
from steplm.training.assemble import PhaseStart, assemble
from steplm.training.environment import environment
from steplm.training.step import StepOptions, train_step
from steplm.types import TrainState

WARMUP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["corpus_60m", "llama_368m"], help="YAML files or recipes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="compiled layers too")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of one step of each stage, by time")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="default: H100 and H200")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, after --")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    report: dict[str, Any] = {"environment": environment(device), "peak_tflops": arguments.peak_tflops, "stages": []}
    for run in arguments.runs:
        for stages in (1, None):
            methods = ["plan.num_stages=1"] if stages == 1 else []
            ours = ["data.train=unused", "train.gradient_accumulation_steps=1", f"train.device={device.type}"]
            for compiled in (False, True) if arguments.compile else (False,):
                values = [*ours, *methods, f"train.compile={str(compiled).lower()}", *arguments.overrides]
                config = load_config(run, values)
                for stage in plan(config).stages:
                    row = {"run": run, "method": "vanilla" if stages == 1 else "step", "compiled": compiled}
                    row |= _measure(config, stage, device, arguments)
                    report["stages"].append(row)
                    print(
                        f"{run:12} {row['method']:8} stage {stage.index} {'compiled' if compiled else 'plain':9}"
                        f"{row['tokens_per_second']:>12,.0f} tok/s  MFU {row['mfu']:.1%}  "
                        f"first step {row['first_step_seconds']:.1f} s",
                        flush=True,
                    )
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def _measure(config: RunConfig, stage: Stage, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    train, phase, model = config.train, stage.highest_phase, config.model.hf_config()
    model_config = hf_config(model, stage.num_hidden_layers)
    weights = initial_state(model_config, seed=0, dtype=DTYPES[train.precision])
    start = PhaseStart(model_config, weights, (), TrainState(phase.stage, phase.index, 0, 0, 0))
    assembled = assemble(config, shape_from_hf_config(model), phase, start, World(device), check=False)
    shape = (train.per_device_train_batch_size, train.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch, how = Batch(tokens, tokens.roll(-1, dims=1)), StepOptions(shape[0], train.loss_chunk_size)
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        train_step(assembled.model, assembled.rules, batch, how, learning_rate=1e-4, max_grad_norm=1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if arguments.profile:
        with torch.profiler.profile() as profile:
            train_step(assembled.model, assembled.rules, batch, how, learning_rate=1e-4, max_grad_norm=1.0)
        arguments.profile.mkdir(parents=True, exist_ok=True)
        sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        name = f"{config.name}-{stage.index}of{stage.num_hidden_layers}{'-compiled' if train.compile else ''}.txt"
        table = profile.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=70)
        (arguments.profile / name).write_text(table)
    del assembled
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rate = tokens.numel() / statistics.median(seconds[WARMUP_STEPS:])
    return {
        "stage": stage.index,
        "layers": stage.num_hidden_layers,
        "batch": shape,
        "tokens_per_second": round(rate, 1),
        "mfu": round(rate * stage.flops_per_token / (arguments.peak_tflops * 1e12), 4),
        "first_step_seconds": round(seconds[0], 2),
        "step_seconds": [round(value, 4) for value in seconds[WARMUP_STEPS:]],
    }


if __name__ == "__main__":
    main()
