"""Measure the cost of each update rule, as a share of a step's forward and backward passes, in the layers of a run.

    OMP_NUM_THREADS=1 python benchmarks/update_cost.py
    python benchmarks/update_cost.py --device cuda --precision bf16 --layers 24

Measured on ``--layers`` layers without embeddings and head, which AdamW always updates. Forward and backward passes are
timed on one sequence and scaled up, because they are linear in the number of sequences. Times are the median of
``--repeats`` after one warm-up. ``flops`` counts matrix products only, and is 0 for rules without any. The share of the
update falls with the number of tokens per step; ``share_at`` gives it for several.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from steplm import load_config
from steplm.cost.flops import newton_schulz_flops
from steplm.models.build import DTYPES, hf_config
from steplm.models.device import resolve_device
from steplm.optim.adamw import AdamW
from steplm.optim.muon import Muon
from steplm.optim.scale import SCALE
from steplm.training.environment import environment

TOKENS = (8_192, 32_768, 131_072, 524_288)
RULES: dict[str, Callable[..., Any]] = {
    "adamw": AdamW,
    "adamw 8bit": partial(AdamW, states="8bit"),
    "muon": Muon,
    "muon 8bit": partial(Muon, states="8bit"),
    "scale": SCALE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="llama_368m", help="a YAML file or a recipe")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    config = load_config(arguments.run)
    length = config.train.sequence_length

    values = hf_config(config.model.hf_config(), arguments.layers)
    values.vocab_size = 8  # the embedding lookup is not measured
    model = AutoModel.from_config(values).to(device, DTYPES[arguments.precision])
    matrices = {name: p for name, p in model.layers.named_parameters() if p.ndim == 2}
    ids = torch.zeros((1, length), dtype=torch.long, device=device)

    def forward_backward() -> None:
        model(input_ids=ids).last_hidden_state.sum().backward()

    per_token = seconds_of(forward_backward, device, arguments.repeats) / length
    attention = 12 * length * values.num_attention_heads * values.head_dim * arguments.layers
    flops_per_token = 6 * sum(p.numel() for p in matrices.values()) + attention
    report: dict[str, Any] = {
        "environment": environment(device),
        "run": arguments.run,
        "layers": arguments.layers,
        "precision": arguments.precision,
        "forward_backward": {"seconds_per_token": per_token, "flops_per_token": flops_per_token},
        "rules": {},
    }
    print(f"{'':12}{'seconds':>9}  share of forward and backward, measured (by FLOPs)")
    print(f"{'tokens of a step':21}" + "".join(f"{tokens:>18,}" for tokens in TOKENS))
    for name in arguments.rules:
        rule = RULES[name](matrices)
        seconds = seconds_of(partial(rule.step, 1e-4), device, arguments.repeats)
        flops = sum(newton_schulz_flops(*p.shape) for p in matrices.values()) if isinstance(rule, Muon) else 0
        shares = {tokens: (seconds / (per_token * tokens), flops / (flops_per_token * tokens)) for tokens in TOKENS}
        report["rules"][name] = {
            "seconds": seconds,
            "flops": flops,
            "share_at": {
                tokens: {"seconds": by_time, "flops": by_flops} for tokens, (by_time, by_flops) in shares.items()
            },
        }
        cells = (f"{by_time:.2%} ({by_flops:.2%})" for by_time, by_flops in shares.values())
        print(f"{name:12}{seconds:>9.3f}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
        del rule
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median seconds of a call, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
