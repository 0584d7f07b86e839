"""Compare an ordinary (vanilla) step with Hugging Face ``Trainer`` in tokens per second: same model, batch, precision.

    pip install accelerate          # required by Trainer
    python benchmarks/trainer_step.py --rounds 3 --output results/cpu_step.json
    python benchmarks/trainer_step.py --run llama_368m --device cuda --precisions bf16

The two alternate in one process, and the result is their ratio in each round, because ratios are less noisy than
times. In fp32, both sides do the same arithmetic. In ``bf16``, the Trainer uses autocast over fp32 weights (16 bytes
per parameter for weights, gradients and moments, plus the bf16 copies that autocast makes); steplm has bf16 weights
with fp32 master weights (16 bytes in total).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from steplm import load_config
from steplm.data.loader import Batch
from steplm.models.build import DTYPES, build_model, hf_config, initial_state
from steplm.models.device import move
from steplm.optim.adamw import AdamW
from steplm.training.environment import environment
from steplm.training.step import StepOptions, train_step


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def trainer_seconds(
    values: dict[str, Any], precision: str, tokens: torch.Tensor, num_steps: int, device: torch.device
) -> list[float]:
    config = hf_config(values)
    model = build_model(config, initial_state(config, seed=0, dtype=torch.float32))
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=tokens.shape[0],
            max_steps=num_steps,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10**6,
        )
        dataset = [{"input_ids": row, "labels": row} for row in tokens] * (num_steps + 1)
        Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[times]).train()
    return times.seconds


def our_seconds(
    values: dict[str, Any], precision: str, tokens: torch.Tensor, num_steps: int, chunk_size: int, device: torch.device
) -> list[float]:
    config = hf_config(values)
    model = build_model(config, initial_state(config, seed=0, dtype=DTYPES[precision])).train()
    move(model, device)
    optimizer = AdamW(model.named_parameters())
    batch = Batch(input_ids=tokens, labels=tokens.roll(-1, dims=1), position_ids=None)
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        train_step(
            model,
            optimizer,
            batch,
            StepOptions(micro_batch_size=tokens.shape[0], chunk_size=chunk_size),
            learning_rate=1e-3,
            max_grad_norm=1.0,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="per round and side; the first is not counted")
    parser.add_argument("--run", default="corpus_10m", help="a YAML file or a recipe: its model and sequence length")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config, device = load_config(arguments.run, ["data.train=unused"]), torch.device(arguments.device)
    model = config.model.hf_config()
    shape = (arguments.batch_size, config.train.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    report: dict[str, Any] = {"environment": environment(device), "model": model, "batch": shape, "results": {}}
    for precision in arguments.precisions:
        rounds = []
        for _ in range(arguments.rounds):
            num_steps, chunk_size = arguments.steps, arguments.chunk_size
            theirs = statistics.median(trainer_seconds(model, precision, tokens, num_steps, device)[1:])
            ours = statistics.median(our_seconds(model, precision, tokens, num_steps, chunk_size, device)[1:])
            rounds.append({"trainer": tokens.numel() / theirs, "steplm": tokens.numel() / ours, "ratio": theirs / ours})
            print(f"{precision}  Trainer {rounds[-1]['trainer']:,.0f} tok/s  steplm {rounds[-1]['steplm']:,.0f} tok/s  "
                  f"ratio {rounds[-1]['ratio']:.2f}", file=sys.stderr)  # fmt: skip
        report["results"][precision] = {
            "tokens_per_second": rounds,
            "median_ratio": statistics.median(entry["ratio"] for entry in rounds),
        }
    text = json.dumps(report, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
