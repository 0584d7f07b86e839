"""Compare planned with measured seconds per step.

    OMP_NUM_THREADS=1 python benchmarks/seconds.py --rounds 3 --clock process --output results/seconds/cpu.json
    python benchmarks/seconds.py --h200 --output results/seconds/h200.json

On this device, runs a grid of cases (size × batch × stage × option), each with fresh weights and random tokens. Each
round times the small models of ``steplm.training.speeds`` and then every case of the grid. Speeds are fitted to the
small models only; no case of the grid is used. All times are the minimum over the rounds. ``--clock process`` counts
the CPU time of this process, for machines that are busy with other work; with one thread, it equals the time on an idle
machine, except for shared caches. ``--again FILE`` plans again for times that are already measured.

``--h200`` plans the stages in results/gpu_step with ``steplm.cost.seconds`` and fits its constants again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares

from steplm import load_config, plan
from steplm.cost.devices import DEVICES
from steplm.cost.seconds import Speeds, published_speeds, step_seconds, total_seconds
from steplm.cost.work import step_work
from steplm.models.device import resolve_device
from steplm.training.environment import environment
from steplm.training.speeds import Trial, least_seconds, make_trial, small_trials, speeds_of

SIZES = {
    "2.7M": (128, 352, 8, 4, 2048),
    "11M": (256, 688, 9, 4, 8192),
    "30M": (448, 1200, 8, 7, 12000),
    "118M": (1024, 2736, 4, 16, 32000),  # four layers of the 368M recipe
}
STEP = ("plan.num_stages=2", "pet.rank=32")
OPTIONS: dict[str, tuple[str, ...]] = {
    "vanilla": (),
    "STEP, stage 1": (*STEP, "stage=1"),
    "STEP, stage 2": STEP,
    "no adapters": (*STEP, "pet.method=none"),
    "recomputed": ("train.gradient_checkpointing=true",),
    "8-bit states": ("memory.optimizer_states=8bit",),
    "no master weights": ("memory.master_weights=false",),
    "8-bit masters": ("memory.master_weights=8bit",),
    "Muon": ("optim.name=muon",),
    "SCALE": ("optim.name=scale",),
    "int8 frozen": (*STEP, "memory.frozen_weights=int8"),
    "nf4 frozen": (*STEP, "memory.frozen_weights=nf4"),
    "activations in host memory": ("memory.offload_activations=true",),
    "two micro-batches": ("train.gradient_accumulation_steps=2",),
}
NAMES = ("size", "sequences", "length", "precision", "option")
CASES = [
    *(("2.7M", 4, 256, "fp32", name) for name in ("vanilla", "STEP, stage 1", "STEP, stage 2", "recomputed", "Muon")),
    ("2.7M", 1, 256, "fp32", "vanilla"),
    ("2.7M", 16, 256, "fp32", "vanilla"),
    ("11M", 2, 512, "fp32", "vanilla"),
    ("11M", 2, 512, "fp32", "STEP, stage 2"),
    *(("11M", 2, 512, "bf16", name) for name in OPTIONS),
    ("11M", 8, 512, "bf16", "vanilla"),
    ("11M", 8, 512, "bf16", "STEP, stage 2"),
    *(("30M", 2, 512, "bf16", name) for name in ("vanilla", "STEP, stage 2", "recomputed", "8-bit states", "Muon")),
    ("30M", 1, 1024, "fp32", "vanilla"),
    *(("118M", 1, 1024, "bf16", name) for name in ("vanilla", "STEP, stage 1", "STEP, stage 2", "8-bit states")),
    ("118M", 1, 1024, "fp32", "vanilla"),
]
SMALL_SECONDS = 25.0  # spent on the small models in each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--again", type=Path)
    parser.add_argument("--h200", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = of_the_h200() if arguments.h200 else of_this_device(arguments)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def of_this_device(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the small models and the grid, and plan the grid with speeds from the small models."""
    device = resolve_device(arguments.device)
    clock = time.process_time if arguments.clock == "process" else time.perf_counter
    small = small_trials(device)
    if arguments.again:
        kept = json.loads(arguments.again.read_text())
    else:
        cases = [case for case in CASES if case[0] in arguments.sizes]
        kept = {"environment": environment(device), "clock": arguments.clock, "rounds": arguments.rounds}
        kept["small_seconds"], seconds = _measured(cases, small, device, arguments.rounds, clock)
        kept["cases"] = [_row(case, math.nan, sum(times)) for case, times in zip(cases, seconds, strict=True)]
    speeds = speeds_of(small, kept["small_seconds"], device)
    kept["per_second"] = dict(speeds.per_second)
    for row in kept["cases"]:
        config, stage = _config(tuple(row[name] for name in NAMES))
        made = plan(config)
        phase = made.stages[-1 if stage is None else stage - 1].highest_phase
        planned = step_seconds(config, made.shape, phase, speeds)
        assert planned is not None
        row |= {"planned_seconds": planned.total, "ratio": planned.total / row["measured_seconds"]}
    _print(kept["cases"])
    return kept | _summary(kept["cases"])


def _measured(
    cases: list[Any], small: list[Trial], device: torch.device, rounds: int, clock: Callable[[], float]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The seconds of the passes and of the update, for the small models and for the cases."""
    least_small, least = [[(math.inf, math.inf)] * len(each) for each in (small, cases)]
    for number in range(rounds):
        least_small = list(map(_lesser, least_small, least_seconds(small, device, SMALL_SECONDS, clock)))
        for index, case in enumerate(cases):
            config, stage = _config(case)
            (measured,) = least_seconds([make_trial(config, device, stage)], device, 0.0, clock)
            least[index] = _lesser(least[index], measured)
            gc.collect()
        print(f"round {number + 1} of {rounds}", flush=True)
    return least_small, least


def _lesser(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return min(first[0], second[0]), min(first[1], second[1])


def _config(case: tuple[Any, ...]) -> tuple[Any, int | None]:
    size, sequences, length, precision, option = case
    hidden, inner, layers, heads, vocabulary = SIZES[size]
    given = [x for x in OPTIONS[option] if not x.startswith("stage=")]
    stage = next((int(x.partition("=")[2]) for x in OPTIONS[option] if x.startswith("stage=")), None)
    model = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }
    train = {"sequence_length": length, "per_device_train_batch_size": sequences, "precision": precision}
    values = {"model": model, "train": train, "plan": {"num_stages": 1}, "data": {"train": "unused"}}
    return load_config(values, given), stage


def _row(case: tuple[Any, ...], planned: float, measured: float) -> dict[str, Any]:
    numbers = {"planned_seconds": planned, "measured_seconds": measured, "ratio": planned / measured}
    return dict(zip(NAMES, case, strict=True)) | numbers


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    errors = [abs(row["ratio"] - 1) for row in rows]
    return {"median_error": round(float(statistics.median(errors)), 3), "worst_error": round(max(errors), 3)}


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        *case, planned, measured, ratio = row.values()
        print("  ".join(map(str, case)), f"planned {planned:.4f}  measured {measured:.4f}  ratio {ratio:.2f}")
    print(_summary(rows))


def of_the_h200() -> dict[str, Any]:
    """Compare measured with planned stages, and fit the achieved shares of the published speeds."""
    stages, rows = [], []
    for run, extra in (("llama_368m", ()), ("corpus_60m", ("train.loss_chunk_size=4096",))):
        for measured in json.loads(Path(f"results/gpu_step/{run}.json").read_text())["stages"]:
            given = ["train.gradient_accumulation_steps=1", "data.train=unused", "train.device=cuda", *extra]
            given.append(f"train.compile={str(measured['compiled']).lower()}")
            config = load_config(run, [*given, *(["plan.num_stages=1"] if measured["method"] == "vanilla" else [])])
            made = plan(config)
            phase = made.stages[measured["stage"] - 1].highest_phase
            seconds = statistics.median(measured["step_seconds"])
            planned = step_seconds(config, made.shape, phase, published_speeds("h200"))
            assert planned is not None
            compiled = "compiled" if measured["compiled"] else "plain"
            case = (run, *measured["batch"], "bf16", f"{measured['method']} stage {measured['stage']}, {compiled}")
            rows.append(_row(case, planned.total, seconds))
            stages.append((step_work(config, made.shape, phase, on_cuda=True), seconds))
    names = ("products", "bytes", "operands")
    published = DEVICES["h200"]

    def speeds(logs: np.ndarray) -> Speeds:
        products, moved, operands = np.exp(logs)
        per_second = dict(published_speeds("h200").per_second)
        for kind in per_second:
            if kind not in ("bus", "launches", "bf16 attention", "fp32 attention"):
                per_second[kind] = moved * published.bandwidth
        per_second |= {"bf16 products": products * published.bf16_flops, "operands": operands * published.bandwidth}
        return Speeds("h200", per_second, True, "")

    def errors(logs: np.ndarray) -> list[float]:
        trial = speeds(logs)
        totals = [total_seconds([(w, trial.seconds(w)) for w in work], True) for work, _ in stages]
        return [float(np.log(total / seconds)) for total, (_, seconds) in zip(totals, stages, strict=True)]

    fitted = least_squares(errors, np.log([0.5, 0.5, 2.0]))
    shares = dict(zip(names, np.exp(fitted.x).round(3).tolist(), strict=True))
    _print(rows)
    print("fitted again:", shares)
    return {"fitted_shares": shares, **_summary(rows), "cases": rows}


if __name__ == "__main__":
    main()
