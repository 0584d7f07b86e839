"""Compare an ordinary (vanilla) step with other trainers in tokens per second: same model, batch and precision, eager.

    pip install accelerate litgpt   # a trainer that is not installed is left out
    OMP_NUM_THREADS=1 python benchmarks/peers.py --precisions fp32 --output results/peers_cpu.json
    python benchmarks/peers.py --run llama_368m --device cuda --precisions bf16

The trainers alternate in one process, and the result is the ratio of their speeds in each round, because ratios are
less noisy than times. The first step of a round is not counted. Peaks are of allocated memory, on CUDA only.

- ``trainer`` is Hugging Face ``Trainer``. In ``bf16`` it uses autocast over fp32 weights: 16 bytes per parameter for
  weights, gradients and moments, and the bf16 copies that autocast makes.
- ``litgpt`` is its model and loss in the steps of ``litgpt.pretrain.fit``, under Lightning Fabric. In ``bf16``,
  weights, gradients and moments are all bf16, without master weights: 8 bytes per parameter.
- ``steplm`` in ``bf16`` has bf16 weights with fp32 master weights: 16 bytes per parameter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steplm import load_config
from steplm.data.loader import Batch
from steplm.models.build import DTYPES, build_model, hf_config, initial_state
from steplm.models.device import move
from steplm.optim.adamw import AdamW
from steplm.optim.build import UpdateRules
from steplm.planner.shape import shape_from_hf_config
from steplm.training.environment import environment
from steplm.training.step import StepOptions, train_step

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Setting:
    """What all trainers have in common; ``tokens`` is one batch (sequences, length)."""

    model: dict[str, Any]
    precision: str
    tokens: Tensor
    num_steps: int
    device: torch.device
    chunk_size: int


def steplm(setting: Setting) -> Iterator[None]:
    """A training loop that yields after every step."""
    weights = initial_state(hf_config(setting.model), seed=0, dtype=DTYPES[setting.precision])
    model = build_model(hf_config(setting.model), weights).train()
    move(model, setting.device)
    rule = AdamW(model.named_parameters())
    optimizer = UpdateRules({"adamw": rule}, rule.parameters)
    batch = Batch(input_ids=setting.tokens, labels=setting.tokens.roll(-1, dims=1), position_ids=None)
    options = StepOptions(micro_batch_size=len(setting.tokens), chunk_size=setting.chunk_size)
    for _ in range(setting.num_steps):
        train_step(model, optimizer, batch, options, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
        yield


def trainer(setting: Setting) -> list[float]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._started = now(setting.device)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(now(setting.device) - self._started)

    config, times = hf_config(setting.model), Times()
    model = build_model(config, initial_state(config, seed=0, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(setting.tokens),
            max_steps=setting.num_steps,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            optim="adamw_torch_fused",
            bf16=setting.precision == "bf16",
            use_cpu=setting.device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10**6,
        )
        dataset = [{"input_ids": row, "labels": row} for row in setting.tokens] * (setting.num_steps + 1)
        Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[times]).train()
    return times.seconds


def litgpt(setting: Setting) -> Iterator[None]:
    import lightning
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

    shape = setting.model
    config = Config(
        block_size=setting.tokens.shape[1],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    precision: Any = {"fp32": "32-true", "bf16": "bf16-true"}[setting.precision]
    fabric = lightning.Fabric(accelerator=setting.device.type, devices=1, precision=precision)
    with fabric.init_module(empty_init=False):
        module = GPT(config)
    assert sum(p.numel() for p in module.parameters()) == shape_from_hf_config(shape).num_parameters(
        shape["num_hidden_layers"]
    )
    model = fabric.setup(module)
    optimizer = fabric.setup_optimizers(
        instantiate_torch_optimizer("AdamW", model.parameters(), lr=LEARNING_RATE, fused=True)
    )
    ids, targets = (tokens.to(setting.device) for tokens in (setting.tokens, setting.tokens.roll(-1, dims=1)))
    for _ in range(setting.num_steps):
        fabric.backward(chunked_cross_entropy(model(ids), targets))
        fabric.clip_gradients(model, optimizer, max_norm=MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(steps: Iterator[None], device: torch.device) -> list[float]:
    """Seconds of every step, the first with its preparation."""
    times = [now(device)]
    for _ in steps:
        times.append(now(device))
    return [after - before for before, after in pairwise(times)]


# By name: the package that must be installed, and the function that times its steps.
PEERS: dict[str, tuple[str, Callable[[Setting], list[float]]]] = {
    "trainer": ("accelerate", trainer),
    "litgpt": ("litgpt", lambda setting: seconds_of(litgpt(setting), setting.device)),
}


def measure(seconds: Callable[[], list[float]], setting: Setting) -> dict[str, float]:
    """Tokens per second, in the median of all steps but the first, and the peak on CUDA."""
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = {"tokens_per_second": setting.tokens.numel() / statistics.median(seconds()[1:])}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated()} if setting.device.type == "cuda" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="per round and trainer; the first is not counted")
    parser.add_argument("--run", default="corpus_10m", help="a YAML file or a recipe: its model and sequence length")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config, device = load_config(arguments.run, ["data.train=unused"]), torch.device(arguments.device)
    peers = [name for name in arguments.peers if importlib.util.find_spec(PEERS[name][0]) is not None]
    shape = (arguments.batch_size, config.train.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    versions = {name: version(PEERS[name][0]) for name in peers}
    report: dict[str, Any] = {"environment": environment(device), "peers": versions, "batch": shape, "results": {}}
    report["model"] = config.model.hf_config()
    for precision in arguments.precisions:
        setting = Setting(report["model"], precision, tokens, arguments.steps, device, arguments.chunk_size)
        rounds = []
        for _ in range(arguments.rounds):
            found = {name: measure(partial(PEERS[name][1], setting), setting) for name in peers}
            found["steplm"] = measure(lambda of=setting: seconds_of(steplm(of), device), setting)
            rounds.append(found)
            print(precision, {name: round(side["tokens_per_second"]) for name, side in found.items()}, file=sys.stderr)
        ratios = {
            name: statistics.median(r["steplm"]["tokens_per_second"] / r[name]["tokens_per_second"] for r in rounds)
            for name in peers
        }
        report["results"][precision] = {"rounds": rounds, "median_ratios": ratios}
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
