"""Time a layer with adapters against the same layer trained in full, and against the bound that FLOPs set.

    OMP_NUM_THREADS=1 python benchmarks/adapters.py --rounds 12 --output results/adapters_cpu.json
    python benchmarks/adapters.py --device cuda --precision bf16 --batch-size 8

Measures the forward and backward pass of one layer of a run. In ``separate``, the adapters' products are operations of
their own; ``function`` is what steplm runs. All cases take turns in each round. Ratios are medians over the rounds,
seconds are the least. On a CPU they are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from steplm import load_config
from steplm.cost.flops import training_flops_per_token
from steplm.models.build import DTYPES, hf_config
from steplm.models.device import resolve_device
from steplm.pet.adapters import attach
from steplm.pet.lora import LoRALinear
from steplm.planner.shape import shape_from_hf_config
from steplm.schedule import Adapter, Entry, Frozen, Phase, Role, Trained
from steplm.training.environment import environment


class SeparateLoRALinear(LoRALinear):
    """The same sum; autograd makes two gradients of the input and adds them."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        output = torch.addmm(self.base(rows), F.linear(rows, self.lora_A), self.lora_B.t(), alpha=self.scaling)
        return output.view(*input.shape[:-1], self.out_features)


class Launches(TorchDispatchMode):
    """Counts operations that are not views."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="llama_368m", help="a YAML file or a recipe")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1/8 and 1/32 of the hidden size")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, dtype = resolve_device(arguments.device), DTYPES[arguments.precision]
    config = load_config(arguments.run)
    length, d = config.train.sequence_length, config.model.hidden_size
    shape = replace(shape_from_hf_config(config.model.hf_config()), vocab_size=0)  # without a head
    values = hf_config(config.model.hf_config(), 1)
    values.vocab_size = 8  # the embeddings are not measured
    plain = AutoModel.from_config(values).to(device, dtype)

    cases: dict[str, tuple[Any, Role]] = {}
    for rank in arguments.ranks or (d // 8, d // 32):
        role = Adapter(rank, 4.0 * rank, tuple(linear.name.rpartition(".")[2] for linear in shape.linears))
        for name, kind in (("separate", SeparateLoRALinear), ("function", LoRALinear)):
            cases[f"{name}, rank {rank}"] = (_layer(plain, role, kind), role)
    roles: dict[str, Role] = {"trained": Trained(), "frozen": Frozen()}
    cases = {name: (_layer(plain, role), role) for name, role in roles.items()} | cases

    hidden = torch.randn(arguments.batch_size, length, d, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(hidden)
    angles = plain.rotary_emb(hidden, torch.arange(length, device=device)[None])

    def forward_backward(layer: nn.Module) -> None:
        layer(hidden * 1, position_embeddings=angles).backward(gradient)
        hidden.grad = None
        layer.zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(arguments.rounds + 1):
        for name, (layer, _) in cases.items():
            taken = _seconds(lambda layer=layer: forward_backward(layer), device)
            if number:
                seconds[name].append(taken)

    report: dict[str, Any] = {
        "environment": environment(device), "run": arguments.run, "precision": arguments.precision,
        "tokens": hidden.shape[0] * length, "rounds": arguments.rounds, "cases": {},
    }  # fmt: skip
    flops = {name: _flops(shape, role, length) for name, (_, role) in cases.items()}
    print(f"{'':22}{'seconds':>9}{'launches':>10}{'of trained':>12}{'FLOP bound':>12}")
    for name, (layer, _) in cases.items():
        with Launches() as launches:
            forward_backward(layer)
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds["trained"], strict=True)]
        found = {
            "seconds": round(min(seconds[name]), 5),
            "launches": launches.number,
            "of_trained": round(statistics.median(ratios), 3),
            "flop_bound": round(flops[name] / flops["trained"], 3),
        }
        if name.startswith("function"):
            theirs = seconds[name.replace("function", "separate")]
            ratio = statistics.median(a / b for a, b in zip(seconds[name], theirs, strict=True))
            found["of_separate"] = round(ratio, 3)
        report["cases"][name] = found
        print(f"{name:22}{found['seconds']:>9.4f}{found['launches']:>10}{found['of_trained']:>12.3f}"
              f"{found['flop_bound']:>12.3f}")  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def _layer(model: Any, role: Role, kind: type[LoRALinear] = LoRALinear) -> nn.Module:
    """A copy of the model's layer in this role; adapters are random, not zero."""
    model = copy.deepcopy(model)
    attach(model, _phase(role), "layers", seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(isinstance(role, Trained) or "lora" in name)
        if "lora" in name:
            nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.__class__ = kind
    layer: nn.Module = model.layers[0]
    return layer


def _phase(role: Role) -> Phase:
    return Phase(1, 1, Entry("fresh"), (role,), Trained(), 0, 0, 0)


def _flops(shape: Any, role: Role, length: int) -> int:
    return training_flops_per_token(shape, _phase(role), length)


def _seconds(call: Any, device: torch.device) -> float:
    on_cuda = device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    if on_cuda:
        torch.cuda.synchronize()
    started = clock()
    call()
    if on_cuda:
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    main()
