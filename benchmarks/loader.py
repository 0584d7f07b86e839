"""Measure the training data loader at the scale of large runs: start-up time, memory, milliseconds per batch.

Token files are sparse, so that 135 billion tokens take no disk space; document offsets are real.

    python benchmarks/loader.py FOLDER --windows 132e6 --order windows --order documents

To measure how long training steps wait for batches, which a thread prepares during the previous step:

    OMP_NUM_THREADS=1 python benchmarks/loader.py FOLDER --train quickstart --output results/loader_idle.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steplm.config import load_config
from steplm.data.loader import Batch, BatchLoader, Prefetcher
from steplm.data.shards import write_json
from steplm.data.tokens import MANIFEST, Manifest, Shard, SplitManifest, TokenDataset, TokenizerManifest
from steplm.training import run as run_module
from steplm.training.environment import environment
from steplm.training.metrics import read_metrics
from steplm.types import to_json

SEQUENCE_LENGTH = 1024
SHARD_TOKENS = 32_000_000


def make(folder: Path, num_windows: int, document_tokens: int) -> None:
    (folder / "train").mkdir(parents=True)
    offsets = np.arange(0, SHARD_TOKENS + 1, document_tokens, dtype="<i8")
    offsets[-1] = SHARD_TOKENS
    np.save(folder / "offsets.npy", offsets)
    data = (folder / "offsets.npy").read_bytes()
    shards = []
    for number in range(-(-num_windows * SEQUENCE_LENGTH // SHARD_TOKENS)):
        stem = folder / "train" / f"shard-{number:05d}"
        with Path(f"{stem}.bin").open("wb") as file:
            file.truncate(2 * SHARD_TOKENS)
        Path(f"{stem}.offsets.npy").write_bytes(data)
        shards.append(
            Shard(stem.name, SHARD_TOKENS, len(offsets) - 1, 0, 0, "", hashlib.sha256(data).hexdigest()),
        )
    splits = {"train": SplitManifest(tuple(shards)), "validation": SplitManifest(())}
    tokenizer = TokenizerManifest("none", 50257, 0, "")
    write_json(folder / MANIFEST, to_json(Manifest("", "uint16", tokenizer, splits, 0, 0, 0, ())))


def resident_bytes(key: str) -> int:
    """``VmRSS``, or its highest value so far, ``VmHWM``, for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(folder: Path, order: str, num_sequences: int) -> None:
    before = resident_bytes("VmRSS")
    began = time.perf_counter()
    loader = BatchLoader(
        TokenDataset(folder, "train"),
        seed=0,
        sequence_length=SEQUENCE_LENGTH,
        max_sorted_windows=None if order == "documents" else 0,
    )
    per_epoch = loader.sources[0].per_epoch
    loader.batch(0, num_sequences)
    started = time.perf_counter()
    places = [number * per_epoch // 20 for number in range(20)]  # 20 batches spread over the epoch
    for place in places:
        loader.batch(place * SEQUENCE_LENGTH, num_sequences)
    batch_seconds = (time.perf_counter() - started) / len(places)
    print(
        f"{order:10} {per_epoch:>12,} windows  first batch after {started - began:6.2f} s  "
        f"peak +{(resident_bytes('VmHWM') - before) / 2**20:8.1f} MiB  "
        f"{1000 * batch_seconds:6.1f} ms a batch of {num_sequences} x {SEQUENCE_LENGTH}",
        flush=True,
    )


def measure_idle(folder: Path, recipe: str, num_steps: int) -> dict[str, Any]:
    """Train ``num_steps`` steps; compare the time spent waiting for batches with the total time of the steps."""
    made: list[Prefetcher] = []

    class Kept(Prefetcher):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

        def batch(self, tokens_seen: int) -> Batch:
            before = self.seconds_waited
            batch = super().batch(tokens_seen)
            if tokens_seen == 0:  # the first batch cannot be prepared in advance
                self.seconds_waited = before
            return batch

    run_module.Prefetcher = Kept  # type: ignore[misc]
    one_stage = ["method=vanilla", "plan.num_stages=1", "log.progress=none", "train.num_threads=1"]
    step_tokens = load_config(recipe, one_stage).step_tokens
    config = load_config(
        recipe, [*one_stage, f"output_dir={folder / 'run'}", f"plan.total_tokens={num_steps * step_tokens}"]
    )
    run_module.train(config)
    events = read_metrics(config.run_dir / "metrics.jsonl", "train")
    seconds = sum(
        (event["tokens_seen"] - before) / event["tokens_per_second"]
        for before, event in zip([0, *(event["tokens_seen"] for event in events)], events, strict=False)
    )
    return {
        "recipe": recipe,
        "steps": num_steps,
        "step_tokens": config.step_tokens,
        "seconds": seconds,
        "seconds_waited": made[0].seconds_waited,
        "idle_share": made[0].seconds_waited / seconds,
        "environment": environment(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files are made, if they are not there")
    parser.add_argument("--windows", type=float, default=132e6)
    parser.add_argument("--document-tokens", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=512, help="of a batch")
    parser.add_argument("--order", action="append", help="documents or windows; several: one after the other")
    parser.add_argument("--train", metavar="RUN", help="a YAML file or recipe whose steps' idle share is measured")
    parser.add_argument("--steps", type=int, default=100, help="of --train")
    parser.add_argument("--output", type=Path, help="a JSON file, of --train")
    given = parser.parse_args()
    if given.train is not None:
        found = json.dumps(measure_idle(given.folder, given.train, given.steps), indent=1)
        print(found)
        if given.output is not None:
            given.output.write_text(found + "\n")
        return
    if not (given.folder / MANIFEST).is_file():
        make(given.folder, int(given.windows), given.document_tokens)
    orders = given.order or ["windows"]
    if len(orders) == 1:
        measure(given.folder, orders[0], given.sequences)
        return
    for order in orders:  # in separate processes, so that each has its own peak memory
        command = [sys.executable, __file__, str(given.folder), "--order", order, "--sequences", str(given.sequences)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
