"""Measure the overhead of FSDP2 on one device: a step sharded over a world of one, against a plain step.

    python benchmarks/fsdp_step.py --run llama_368m --rounds 5 --output results/fsdp_step.json

Every stage of the run's plan is assembled twice from the same weights, plain and sharded over one rank. Both run the
same steps alternately in one process; the result is the ratio of their median times. The difference of their losses is
reported too. On a GPU, NCCL does the collectives. Runs do not have this overhead: with one rank, nothing is sharded.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from steplm.config import load_config
from steplm.data.loader import Batch
from steplm.distributed.world import World, joined
from steplm.models.build import DTYPES, hf_config, initial_state
from steplm.models.device import resolve_device
from steplm.models.shape import shape_of
from steplm.planner.plan import plan
from steplm.training.assemble import Assembled, PhaseStart, assemble
from steplm.training.environment import environment
from steplm.training.step import StepOptions, train_step
from steplm.types import TrainState


def step_seconds(assembled: Assembled, batch: Batch, how: StepOptions, num_steps: int) -> tuple[float, float]:
    """The median seconds of a step, without the first, and the last loss."""
    seconds, loss = [], 0.0
    for _ in range(num_steps):
        started = time.perf_counter()
        # Reading the loss at the end of the step waits for the device.
        loss = train_step(assembled.model, assembled.rules, batch, how, learning_rate=1e-4, max_grad_norm=1.0).loss
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="llama_368m", help="a YAML file or a recipe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="per round and side; the first is not counted")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    arguments = parser.parse_args()
    config = load_config(arguments.run, arguments.overrides)
    device, made = resolve_device(config.train.device), plan(config, shape_of(config.model.hf_config()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(launcher)

    train = config.train
    shape = (config.micro_batch_size, train.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens.roll(-1, dims=1))
    stages: list[dict[str, Any]] = []
    with joined(config.distributed, device, even_alone=True) as one:
        for stage in made.stages:
            sides = {"plain": World(one.device), "sharded": one}
            assembled, ways = {}, {}
            phase = stage.highest_phase
            for name, world in sides.items():
                model_config = hf_config(config.model.hf_config(), phase.num_hidden_layers)
                weights = initial_state(model_config, seed=0, dtype=DTYPES[train.precision])
                start = PhaseStart(model_config, weights, (), TrainState(phase.stage, phase.index, 0, 0, 0))
                assembled[name] = assemble(config, made.shape, phase, start, world, check=False)
                ways[name] = StepOptions(config.micro_batch_size, train.loss_chunk_size, world=world)
            rounds = []
            for _ in range(arguments.rounds):
                measured = {name: step_seconds(assembled[name], batch, ways[name], arguments.steps) for name in sides}
                rounds.append(
                    {
                        **{f"{name}_seconds": seconds for name, (seconds, _) in measured.items()},
                        "ratio": measured["sharded"][0] / measured["plain"][0],
                        "loss_difference": abs(measured["sharded"][1] - measured["plain"][1]),
                    }
                )
            median = statistics.median(entry["ratio"] for entry in rounds)
            print(f"stage {stage.index}: sharded over one device takes {median:.3f} times as long", flush=True)
            stages.append({"stage": stage.index, "median_ratio": median, "rounds": rounds})
    report = {"environment": environment(device), "batch": shape, "stages": stages}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
