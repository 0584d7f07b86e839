"""Measure the time and memory of preparing text, for several amounts of it.

    STEPLM_DATA=../shared/data python benchmarks/prepare.py --tokens 10M 20M 40M --output results/prepare.json

Each amount is prepared by a new process, with a tokenizer of 2,048 tokens that is trained beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from steplm.training.environment import environment

CORPUS = f"{os.environ.get('STEPLM_DATA', '../shared/data')}/corpus"

# The command, then its peak resident size in KiB; the system resets that size when a program starts.
PREPARE = r"""
import re, sys
from pathlib import Path
from steplm.cli.app import app

app(sys.argv[1:], standalone_mode=False)
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", default=["10M", "20M", "40M"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder / "tokenizer", "100k", "train")
        for tokens in arguments.tokens:
            seconds, peak_bytes = prepare(folder / tokens, tokens, str(folder / "tokenizer/prepared/tokenizer"))
            rows.append({"max_train_tokens": tokens, "seconds": seconds, "peak_resident_bytes": peak_bytes})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.output:
        report = {"environment": environment(torch.device("cpu")), "rows": rows}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def prepare(folder: Path, tokens: str, tokenizer: str) -> tuple[float, int]:
    """Run ``steplm prepare`` in a process of its own; return its seconds and peak resident bytes."""
    start = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-c", PREPARE, "prepare", "quickstart", "model.vocab_size=2048"),
            f"output_dir={folder}",
            f"data.prepared_dir={folder / 'prepared'}",
            f"data.train={CORPUS}/train-*.jsonl.gz",
            f"data.validation={CORPUS}/validation-*.jsonl.gz",
            f"data.tokenizer={tokenizer}",
            f"data.max_train_tokens={tokens}",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - start, 1024 * int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
