"""Measure memory, losses and speed with optimizer and weights in host memory, against the same training on the device.

    OMP_NUM_THREADS=1 python benchmarks/host.py --without-speed --output results/host_cpu.json
    python benchmarks/host.py --run llama_368m --precision bf16 --device cuda --micro-batches 1 8 64

For each number of micro-batches per step, one row has the optimizer in host memory, and the next also the weights
(``memory.offload_weights``). A row reports planned and measured bytes on the device and in host memory, bytes over the
bus per step, whether losses are bitwise equal to those without either option (with gradients summed in fp32), and
tokens per second with and without: the median of ``--steps`` steps after one warm-up step. For the update on the CPU,
reports the bytes read and written per second, as a share of the rate at which the same process copies a large tensor;
the best of ``--steps`` tries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from steplm import RunConfig, load_config, plan
from steplm.cost.measure import measure_model_state
from steplm.data.loader import Batch
from steplm.distributed.world import World
from steplm.models.build import DTYPES, hf_config, initial_state
from steplm.models.device import free_memory, resolve_device
from steplm.models.shape import shape_of
from steplm.optim.adamw import AdamW
from steplm.training.assemble import Assembled, PhaseStart, assemble, packed_rows
from steplm.training.environment import environment
from steplm.training.step import step_options, train_step
from steplm.types import MemoryEstimate, TrainState

SMALL = (  # used without --run; small enough for a CPU
    "model.hidden_size=256", "model.intermediate_size=688", "model.num_hidden_layers=4", "model.num_attention_heads=4",
    "model.vocab_size=2000", "train.sequence_length=128", "train.per_device_train_batch_size=2",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a YAML file or a recipe; default: a small model")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--update-parameters", type=int, default=2**25, help="of the CPU's update that is timed")
    parser.add_argument("--without-speed", action="store_true", help="where other work makes times meaningless")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    report: dict[str, Any] = {"environment": environment(device), "steps": []}
    if not arguments.without_speed:
        update = update_speed(arguments.update_parameters, arguments.steps)
        report |= {"load_average": os.getloadavg()[0], "update": update}
        print(f"update: {update['bytes_per_second'] / 1e9:.1f} GB/s, {update['share_of_copy']:.0%} of a copy's")
    for micro_batches in arguments.micro_batches:
        overrides = [
            *(SMALL if arguments.run is None else ()), "method=vanilla", "plan.num_stages=1", "plan.layers=null",
            f"train.device={arguments.device}", f"train.precision={arguments.precision}",
            f"train.gradient_accumulation_steps={micro_batches}", "train.gradient_accumulation_dtype=fp32",
            *arguments.overrides,
        ]  # fmt: skip
        config = load_config(arguments.run or {}, overrides)
        for row in beside(config, device, arguments.steps):
            if arguments.without_speed:
                row = {key: value for key, value in row.items() if not key.startswith("tokens_per_second")}
            report["steps"].append(row)
            print(json.dumps(row), flush=True)
            if arguments.output:  # written after each row, in case the benchmark is interrupted
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def update_speed(num_parameters: int, repeats: int) -> dict[str, float]:
    """Bytes per second of an AdamW update of one bf16 matrix with fp32 states and master weights, and of a copy."""
    weight = torch.nn.Parameter(torch.zeros(num_parameters // 1024, 1024, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1e-3)
    rule = AdamW({"weight": weight})
    # Reads the gradient (2 bytes), master weight and both moments (12); writes the latter (12) and the weight (2).
    update = 28 * weight.numel() / best_seconds(lambda: rule.step(1e-4), repeats)
    source = torch.zeros(num_parameters)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), repeats)
    return {
        "parameters": weight.numel(),
        "bytes_per_second": update,
        "copy_bytes_per_second": copied,
        "share_of_copy": update / copied,
    }


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several calls, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def beside(config: RunConfig, device: torch.device, steps: int) -> Iterator[dict[str, Any]]:
    """Compare training on the device alone with each way to use host memory, on the same random tokens."""
    plain_losses, plain_speed, _ = trained(config, device, steps)
    for keys in (("offload_optimizer",), ("offload_optimizer", "offload_weights")):
        memory = config.memory.model_copy(update=dict.fromkeys(keys, True))
        offloaded = config.model_copy(update={"memory": memory})
        planned = plan(offloaded).stages[0]
        losses, speed, held = trained(offloaded, device, steps)
        yield {
            "micro_batches": config.micro_batches,
            "tokens_per_step": config.step_tokens,
            "offloads_weights": memory.offload_weights,
            "planned_device_bytes": planned.memory.total_bytes,
            "planned_host_bytes": planned.memory.host_bytes,
            "held_device_bytes": held.total_bytes,
            "held_host_bytes": held.host_bytes,
            "bytes_to_host_per_step": planned.transfers.to_host,
            "bytes_to_device_per_step": planned.transfers.to_device,
            "losses_are_equal": losses == plain_losses,
            "losses": losses,
            "tokens_per_second": speed,
            "tokens_per_second_without": plain_speed,
        }


def trained(config: RunConfig, device: torch.device, steps: int) -> tuple[list[float], float, MemoryEstimate]:
    """The losses of a few steps, the median speed in tokens per second, and the model state."""
    assembled = assembled_model(config, device)
    options = step_options(config, World(device))
    losses, seconds = [], []
    for step in range(steps + 1):
        torch.manual_seed(step)
        tokens = torch.randint(config.model.vocab_size, (config.global_batch_size, config.train.sequence_length))
        start = time.perf_counter()
        result = train_step(
            assembled.model, assembled.rules, Batch(tokens, tokens), options, learning_rate=1e-3, max_grad_norm=1.0
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
    held = measure_model_state(
        assembled.model,
        assembled.rules,
        config.model.num_hidden_layers,
        host=assembled.rules.host,
        packed=packed_rows(assembled.model),
    )
    del assembled
    free_memory()
    return losses, config.step_tokens / statistics.median(seconds[1:]), held


def assembled_model(config: RunConfig, device: torch.device) -> Assembled:
    """A freshly initialized model of the first phase, with its update rules."""
    phase = plan(config).schedule.phases[0]
    whole = hf_config(config.model.hf_config())
    weights = initial_state(whole, seed=config.seed, dtype=DTYPES[config.train.precision])
    start = PhaseStart(whole, weights, (), TrainState(1, 1, 0, 0, 0))
    return assemble(config, shape_of(config.model.hf_config()), phase, start, World(device))


if __name__ == "__main__":
    main()
