"""Measure how long a save pauses training when it is done before the next step, or in the background.

    OMP_NUM_THREADS=1 python benchmarks/save_pause.py --output results/save_pause.json

A checkpoint with ``--gigabytes`` of tensors (a third weights, the rest optimizer states) is written ``--repeats`` times
in three ways: with safetensors, reading each file again to hash it (as steplm did before); hashed while it is written;
and in the background, where the pause is the copy to memory. ``pause_seconds`` is the median time until training can
continue, and ``seconds`` until the checkpoint is complete.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from steplm.checkpoint.hashed import write_tensors
from steplm.checkpoint.shards import Background, fingerprint
from steplm.files import sync
from steplm.training.environment import environment
from steplm.training.save import copied_to_cpu

Tensors = dict[str, torch.Tensor]


def read_again(files: dict[Path, Tensors], background: Background) -> None:
    for path, tensors in files.items():
        save_file(tensors, path)
        sync(path)
        fingerprint(path)


def hashed(files: dict[Path, Tensors], background: Background) -> None:
    for path, tensors in files.items():
        write_tensors(tensors, path)
        sync(path)


def in_background(files: dict[Path, Tensors], background: Background) -> None:
    copies = {path: copied_to_cpu(tensors) for path, tensors in files.items()}
    background.begin(lambda: hashed(copies, background))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_rows = round(arguments.gigabytes * 1e9 / 3 / 64 / 4096 / 4)
    tensors = [{f"layer.{i}": torch.randn(num_rows, 4096) for i in range(64)} for _ in range(3)]
    states = {f"{key}.{part}": tensor for part, of_part in enumerate(tensors[1:]) for key, tensor in of_part.items()}
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        files = {Path(name) / "model.safetensors": tensors[0], Path(name) / "state.safetensors": states}
        for _ in range(arguments.repeats):  # alternate, because the speed of the machine varies
            for way in (read_again, hashed, in_background):
                background = Background()
                began = time.perf_counter()
                way(files, background)
                pause = time.perf_counter() - began
                background.wait()
                of_way = found.setdefault(way.__name__, {"pause_seconds": [], "seconds": []})
                of_way["pause_seconds"].append(pause)
                of_way["seconds"].append(time.perf_counter() - began)
    num_bytes = sum(tensor.nbytes for part in tensors for tensor in part.values())
    medians = {way: {key: statistics.median(times) for key, times in of.items()} for way, of in found.items()}
    document = {
        "num_bytes": num_bytes,
        "repeats": arguments.repeats,
        "ways": medians,
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(medians, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
