"""Compare 8-bit codes for Adam's moments: the error of the moments, and of the update that they give.

    OMP_NUM_THREADS=1 python benchmarks/moment_codes.py --output results/moment_codes.json

Trains a run with fp32 moments, then quantizes the moments of all matrices in its last checkpoint. ``dynamic`` is the
code of ``memory.optimizer_states: 8bit`` (arXiv 2110.02861). ``companded`` is that of FlashOptim (arXiv 2602.23349):
the moment, divided by the largest magnitude of its block, is transformed by 2x / (1 + |x|) or, for the second moment,
√x, and rounded linearly. ``linear`` has no transform. ``bytes`` are per element, with fp32 scales (``dynamic``) or fp16
scales (the others; of the second moment, the root is stored).

Errors are the 2-norm of the difference over that of the exact tensor; the update is m / (√v + ε), as where the next
gradient is 0. Elsewhere the next gradient makes a second moment that was rounded to 0 positive again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from steplm import load_config, train
from steplm.checkpoint.folder import complete_checkpoints, load_checkpoint
from steplm.cost.formats import STATE_BLOCK
from steplm.optim.quantized import CodeBook
from steplm.training.environment import environment

EPS = 1e-8
Code = Callable[[Tensor, bool], Tensor]  # (flat fp32 moment, whether it is signed) -> what its code represents


def dynamic(values: Tensor, signed: bool) -> Tensor:
    book = CodeBook(signed=signed, device="cpu")
    return book.dequantize(*book.quantize(values))


def blockwise(values: Tensor, signed: bool, *, block: int, companded: bool) -> Tensor:
    blocks = F.pad(values, (0, -len(values) % block)).view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    scale = scale.half().float() if signed else scale.sqrt().half().float().square()  # second moments underflow in fp16
    x = torch.where(scale > 0, blocks / scale, 0.0).clamp(-1, 1)
    levels = 127 if signed else 255
    if companded:
        x = 2 * x / (1 + x.abs()) if signed else x.sqrt()
    x = torch.round(x * levels) / levels
    if companded:
        x = x / (2 - x.abs()) if signed else x.square()
    return (x * scale).view(-1)[: len(values)]


CODES: dict[str, tuple[float, Code]] = {
    f"dynamic, blocks of {STATE_BLOCK}": (1 + 4 / STATE_BLOCK, dynamic),
    "companded, blocks of 32": (1 + 2 / 32, lambda v, signed: blockwise(v, signed, block=32, companded=True)),
    "companded, blocks of 256": (1 + 2 / 256, lambda v, signed: blockwise(v, signed, block=256, companded=True)),
    "linear, blocks of 256": (1 + 2 / 256, lambda v, signed: blockwise(v, signed, block=256, companded=False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="quickstart", help="a YAML file or a recipe")
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}", "method=vanilla", "plan.num_stages=1"]
        train(load_config(arguments.run, [*overrides, f"plan.total_tokens={arguments.tokens}"]))
        optimizer = load_checkpoint(complete_checkpoints(Path(folder) / "checkpoints")[-1]).optimizer
    names = [key.removesuffix(".exp_avg") for key, t in optimizer.items() if key.endswith(".exp_avg") and t.ndim > 1]
    first = [optimizer[f"{name}.exp_avg"].flatten().float() for name in names]
    second = [optimizer[f"{name}.exp_avg_sq"].flatten().float() for name in names]
    exact = [m / (v.sqrt() + EPS) for m, v in zip(first, second, strict=True)]
    rows = []
    for name, (num_bytes, code) in CODES.items():
        m, v = [code(x, True) for x in first], [code(x, False) for x in second]
        update = [a / (b.sqrt() + EPS) for a, b in zip(m, v, strict=True)]
        rows.append(
            {
                "code": name,
                "bytes": num_bytes,
                "error_of_first_moment": error(m, first),
                "error_of_second_moment": error(v, second),
                "error_of_update": error(update, exact),
                "largest_update": max(float(u.abs().max()) for u in update),
            }
        )
        print(json.dumps(rows[-1]))
    result = {
        "run": arguments.run,
        "tokens": arguments.tokens,
        "num_elements": sum(map(len, first)),
        "largest_exact_update": max(float(u.abs().max()) for u in exact),
        "codes": rows,
        "environment": environment(torch.device("cpu")),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    a, b = torch.cat(found), torch.cat(exact)
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    main()
