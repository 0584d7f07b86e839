"""Compare the planned peak with the memory that CUDA's allocator hands out, for real steps on one GPU.

    python benchmarks/gpu_memory.py --output results/gpu_memory/measured.json
    python benchmarks/gpu_memory.py --cases 368m --trace
    python benchmarks/gpu_memory.py --table results/gpu_memory/measured.json    # Markdown, from saved measurements

Each case is a recipe with overrides and the stages to run. Each stage runs two steps with random tokens and constant
weights, as ``steplm plan --calibrate`` does. ``measured`` is the memory allocated to tensors, without the workspaces of
cuBLAS; ``reserved`` is everything the allocator took, including fragmentation; ``device`` is the memory of the whole
process on the GPU, including the CUDA context. With ``--cap``, the process gets only the memory that the plan requires,
the peak plus ``memory.reserve``, so that plans that should fit must run. ``--trace`` lists the allocations alive at the
peak, summed by the line of code that made them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from memory_grid import EVERY_OPTION

from steplm import RunConfig, load_config, plan
from steplm.models.device import resolve_device
from steplm.planner.plan import Stage
from steplm.training.environment import environment
from steplm.training.simulate import LIBRARIES, measure_phase
from steplm.units import format_bytes

CHECKPOINTING = ("train.gradient_checkpointing=true",)
ONE_MICRO_BATCH = ("train.gradient_accumulation_steps=1",)
LEAN = ("method=vanilla", "plan.num_stages=1", "plan.layers=null")
LEAN_MUON = (*LEAN, "optim.name=muon", "memory.optimizer_states=8bit", "memory.master_weights=false")
HOST = ("memory.offload_optimizer=true", "memory.offload_weights=true")
OPTIONS = {
    "8-bit states": ("memory.optimizer_states=8bit",),
    "no master weights": ("memory.master_weights=false",),
    "fused backward": ("memory.fused_backward=true", "optim.max_grad_norm=null", *ONE_MICRO_BATCH),
    "frozen int8": ("memory.frozen_weights=int8",),
    "frozen NF4": ("memory.frozen_weights=nf4",),
    "offload frozen": ("memory.offload_frozen=true",),
    "offload activations": ("memory.offload_activations=true",),
    "checkpointing": CHECKPOINTING,
    "checkpointing of frozen layers": ("train.gradient_checkpointing=frozen",),
    "adapters on embeddings": ("plan.train_embeddings=adapters",),
    "embeddings frozen": ("plan.train_embeddings=first_stage",),
    "no adapters": ("pet.method=none",),
    "no freezing": ("method=growth",),
    "within documents": ("data.within_documents=true",),
    "tied embeddings": ("model.tie_word_embeddings=true",),
    "fp32": ("train.precision=fp32",),
    "grouped queries": ("model.num_key_value_heads=4",),
    "compiled": ("train.compile=true",),
    "compiled, checkpointing": ("train.compile=true", *CHECKPOINTING),
    "qwen2": ("model.model_type=qwen2", "model.num_key_value_heads=4"),
    "qwen3": ("model.model_type=qwen3", "model.num_key_value_heads=4"),
    "mistral": ("model.model_type=mistral", "model.num_key_value_heads=4"),
    "GaLore": ("plan.num_stages=1", "optim.name=galore"),
    "APOLLO-Mini": ("plan.num_stages=1", "optim.name=apollo_mini"),
    "Muon": (*LEAN, "optim.name=muon"),
    "Muon, 8-bit": LEAN_MUON,
    "SCALE": (*LEAN, "optim.name=scale", "memory.master_weights=false"),
    "host": (*LEAN, "memory.offload_optimizer=true"),
    "host, weights too": (*LEAN, *HOST),
    "corrections": (*LEAN, "memory.optimizer_states=8bit", "memory.master_weights=8bit"),
    "every option": (*EVERY_OPTION, *ONE_MICRO_BATCH),
}
LONG = ("train.sequence_length=4096", "model.max_position_embeddings=4096", "train.per_device_train_batch_size=2")
VANILLA = ("plan.num_stages=1",)
# Name: recipe, overrides, stages (None: all; "largest": the one with the highest planned peak)
Case = tuple[str, tuple[str, ...], tuple[int, ...] | str | None]
CASES: dict[str, Case] = {
    "60m vanilla": ("corpus_60m", VANILLA, None),
    "60m": ("corpus_60m", (), None),
    "368m vanilla": ("llama_368m", VANILLA, None),
    "368m": ("llama_368m", (), None),
    "368m batch 1": ("llama_368m", ("train.per_device_train_batch_size=1",), (3,)),
    "368m batch 32": ("llama_368m", ("train.per_device_train_batch_size=32",), (3,)),
    "368m vocabulary 128k": ("llama_368m", ("model.vocab_size=128256",), (3,)),
    "368m sequence 4096": ("llama_368m", LONG, (3,)),
    **{f"368m {name}": ("llama_368m", overrides, "largest") for name, overrides in OPTIONS.items()},
    "1.2b vanilla": ("llama_1.2b", VANILLA, None),
    "1.2b": ("llama_1.2b", (), None),
    "1.2b every option": ("llama_1.2b", (*EVERY_OPTION, *ONE_MICRO_BATCH), "largest"),
    "3b": ("llama_3b", CHECKPOINTING, "largest"),
    "7b host": ("llama_7b", (*LEAN_MUON, *HOST, *CHECKPOINTING), "largest"),
    "7b every option": ("llama_7b", (*EVERY_OPTION, *ONE_MICRO_BATCH, "plan.num_stages=5"), "largest"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="names, or beginnings of names")
    parser.add_argument("--minutes", type=float, default=60.0, help="no case begins after so many")
    parser.add_argument("--cap", action="store_true", help="no more memory than the plan says that it needs")
    parser.add_argument("--trace", action="store_true", help="what is alive at the peak")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a report, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(_table(json.loads(arguments.table.read_text())["stages"])))
        return
    device, began = resolve_device(arguments.device), time.monotonic()  # sets the allocator, as training does
    report: dict[str, Any] = {"environment": environment(device), "context_bytes": None, "stages": []}
    if device.type == "cuda":
        torch.ones(1, device=device)
        report["context_bytes"] = _device_bytes() - torch.cuda.memory_reserved()
        report["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF")
    for name, (recipe, overrides, stages) in CASES.items():
        if not any(name == wanted or name.startswith(f"{wanted} ") for wanted in arguments.cases):
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"{name}: no time left", flush=True)
            continue
        try:
            config = load_config(recipe, [*overrides, "data.train=unused", f"train.device={device.type}"])
            for stage in _chosen(plan(config).stages, stages):
                if arguments.cap:
                    _cap(config.memory.needed_bytes(stage.device_bytes) - report["context_bytes"])
                row = {"case": name, "overrides": overrides, **_measure(config, stage, device, arguments.trace)}
                report["stages"].append(row)
                _print(row)
        except Exception as error:  # continue with the other cases
            traceback.print_exc()
            report["stages"].append({"case": name, "error": f"{type(error).__name__}: {error}"})
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def _chosen(stages: tuple[Stage, ...], wanted: tuple[int, ...] | str | None) -> list[Stage]:
    if wanted == "largest":
        return [max(stages, key=lambda stage: stage.device_bytes)]
    return [stage for stage in stages if wanted is None or stage.index in wanted]


def _measure(config: RunConfig, stage: Stage, device: torch.device, trace: bool) -> dict[str, Any]:
    """The planned and measured bytes of one stage's steps."""
    gc.collect()
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if trace:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=400_000)
    started = time.monotonic()
    measured = measure_phase(config, stage.highest_phase, device)
    seconds = time.monotonic() - started
    assert stage.peak is not None
    planned = {i.name: i.memory.total_bytes for i in stage.peak.instants if i.name not in ("growth", "evaluation")}
    held = measured.highest.memory
    row = {
        "stage": stage.index,
        "layers": stage.num_hidden_layers,
        "planned_state_bytes": stage.memory.total_bytes,
        "planned_bytes": max(planned.values()),
        "measured_bytes": held.total_bytes - held.bytes_of("model", LIBRARIES),
        "library_bytes": held.bytes_of("model", LIBRARIES),
        "planned_moments": planned,
        "measured_moments": {instant.name: instant.memory.total_bytes for instant in measured.instants},
        "seconds": round(seconds, 1),
    }
    if on_cuda:
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
        if trace:
            row["alive_at_peak"] = _alive_at_peak()
            torch.cuda.memory._record_memory_history(enabled=None)
        row["device_bytes"] = _device_bytes()  # the allocator has not returned memory yet
    return row


def _cap(num_bytes: int) -> None:
    """Limit the allocator to this many bytes."""
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.mem_get_info()[1])


def _device_bytes() -> int:
    """Bytes in use on the GPU; those of this process if it is the only one."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _alive_at_peak(top: int = 40) -> list[dict[str, Any]]:
    """Bytes and number of the allocations alive at the peak, by the innermost lines of Python that made them."""
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    alive: dict[int, dict[str, Any]] = {}
    total = highest = 0
    at_highest = -1
    for index, event in enumerate(events):
        total += _change(event, alive)
        if total > highest:
            highest, at_highest = total, index
    alive.clear()
    for event in events[: at_highest + 1]:
        _change(event, alive)
    by_line: dict[tuple[str, int], list[int]] = defaultdict(list)
    for event in alive.values():
        frames = [frame for frame in event["frames"] if frame["filename"] != "??"]
        lines = [f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in frames[:4]]
        by_line[" < ".join(lines), event["size"]].append(event["size"])
    rows = [{"bytes": sum(sizes), "count": len(sizes), "line": line} for (line, _), sizes in by_line.items()]
    return sorted(rows, key=lambda row: -row["bytes"])[:top]


def _change(event: dict[str, Any], alive: dict[int, dict[str, Any]]) -> int:
    if event["action"] == "alloc":
        alive[event["addr"]] = event
        return int(event["size"])
    if event["action"] == "free_requested" and alive.pop(event["addr"], None):
        return -int(event["size"])
    return 0


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of planned and measured bytes, and the bytes that the allocator reserved beyond the plan."""
    lines = [
        "| case | stage | planned | measured | planned / measured | reserved, beyond the plan |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | | | did not run: {row['error'].partition(':')[0]} | | |")
            continue
        planned, measured = row["planned_bytes"], row["measured_bytes"]
        lines.append(
            f"| {row['case']} | {row['stage']} | {format_bytes(planned)} | {format_bytes(measured)} | "
            f"{planned / measured:.4f} | {format_bytes(row['reserved_bytes'] - planned)} |"
        )
    return lines


def _print(row: dict[str, Any]) -> None:
    parts = [
        f"{row['case']:36} stage {row['stage']}",
        f"planned {format_bytes(row['planned_bytes']):>10}",
        f"measured {format_bytes(row['measured_bytes']):>10}",
        f"{row['planned_bytes'] / row['measured_bytes']:.4f}",
    ]
    for name in ("library", "reserved", "device"):
        if f"{name}_bytes" in row:
            parts.append(f"{name} {format_bytes(row[f'{name}_bytes'])}")
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    main()
