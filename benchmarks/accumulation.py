"""Compare the validation loss when gradients of bf16 weights are accumulated in bf16 and in fp32.

    python benchmarks/accumulation.py --output results/accumulation/accumulation.json

Trains a LLaMA of 0.15M parameters on the documentation of this Python installation, with micro-batches of one sequence
of 32 tokens, and 64 or 256 micro-batches per step. Runs in a row differ only in ``train.gradient_accumulation_dtype``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from steplm.config import RunConfig, load_config
from steplm.training.environment import environment
from steplm.training.metrics import read_metrics
from steplm.training.run import train

SEQUENCE_LENGTH = 32
STEPS = {64: 40, 256: 16}  # by micro-batches per step
LEARNING_RATE = 4e-3


def configure(folder: Path, micro_batches: int, dtype: str, seed: int) -> RunConfig:
    return load_config(
        {
            "output_dir": str(folder / f"{micro_batches}-{dtype}-{seed}"),
            "method": "vanilla",
            "seed": seed,
            "model": {
                "hidden_size": 48,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": 1024,
                "max_position_embeddings": SEQUENCE_LENGTH,
            },
            "data": {"train": "builtin://python-docs", "prepared_dir": str(folder / "prepared")},
            "plan": {"num_stages": 1, "total_tokens": STEPS[micro_batches] * micro_batches * SEQUENCE_LENGTH},
            "optim": {"learning_rate": LEARNING_RATE, "warmup_ratio": 0.1},
            "train": {
                "precision": "bf16",
                "device": "cpu",
                "num_threads": 1,
                "sequence_length": SEQUENCE_LENGTH,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": micro_batches,
                "gradient_accumulation_dtype": dtype,
                "dry_run": False,
            },
            "eval": {"max_tokens": "100k", "per_device_eval_batch_size": 32},
            "log": {"progress": "none", "logging_steps": 1},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for micro_batches in STEPS:
            for seed in range(arguments.seeds):
                row: dict[str, float] = {"micro_batches": micro_batches, "seed": seed}
                for dtype in ("param", "fp32"):
                    config = configure(Path(name), micro_batches, dtype, seed)
                    loss = train(config).validation_loss
                    assert loss is not None
                    norms = [e["grad_norm"] for e in read_metrics(config.run_dir / "metrics.jsonl", "train")]
                    row |= {f"loss_{dtype}": loss, f"median_grad_norm_{dtype}": statistics.median(norms)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    document = {
        "steps": STEPS,
        "sequence_length": SEQUENCE_LENGTH,
        "learning_rate": LEARNING_RATE,
        "rows": rows,
        "environment": environment(torch.device("cpu")),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
