"""Published figures of devices, and how much of them training reaches."""

from __future__ import annotations

from dataclasses import dataclass

from steplm.cost.seconds import HOST_UPDATE, Speeds
from steplm.cost.work import KINDS

_A100 = "NVIDIA A100 data sheet (SXM)"
_H100 = "NVIDIA H100 data sheet"
_GA102 = "NVIDIA Ampere GA102 architecture white paper, appendix A"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A"


@dataclass(frozen=True)
class Device:
    """Figures as the maker tells them."""

    title: str  # as PyTorch names it, or a part of that
    memory_bytes: int
    bf16_flops: float  # a second, of dense matrix products summed in fp32
    fp32_flops: float  # a second, without tensor cores
    bandwidth: float  # bytes a second of its memory
    bus: float  # bytes a second to or from the host, in one direction
    source: str


# Bus: PCIe 4.0 x16 has 31.5 GB/s in one direction, PCIe 5.0 x16 63 GB/s.
DEVICES = {
    "a100-40gb": Device("A100-SXM4-40GB", 40 * 10**9, 312e12, 19.5e12, 1555e9, 31.5e9, _A100),
    "a100-80gb": Device("A100-SXM4-80GB", 80 * 10**9, 312e12, 19.5e12, 2039e9, 31.5e9, _A100),
    "a10": Device("A10", 24 * 10**9, 125e12, 31.2e12, 600e9, 31.5e9, "NVIDIA A10 data sheet"),
    "h100": Device("H100 80GB HBM3", 80 * 10**9, 989e12, 67e12, 3350e9, 63e9, f"{_H100} (SXM)"),
    "h100-pcie": Device("H100 PCIe", 80 * 10**9, 756e12, 51e12, 2000e9, 63e9, f"{_H100} (PCIe)"),
    "h200": Device("H200", 141 * 10**9, 989e12, 67e12, 4800e9, 63e9, "NVIDIA H200 data sheet (SXM)"),
    "b200": Device("B200", 180 * 10**9, 2250e12, 75e12, 8000e9, 63e9, "NVIDIA DGX B200 data sheet, an eighth of it"),
    "l4": Device("L4", 24 * 10**9, 121e12, 30.3e12, 300e9, 31.5e9, "NVIDIA L4 data sheet, without sparsity"),
    "l40s": Device("L40S", 48 * 10**9, 362e12, 91.6e12, 864e9, 31.5e9, "NVIDIA L40S data sheet"),
    "a6000": Device("RTX A6000", 48 * 10**9, 154.8e12, 38.7e12, 768e9, 31.5e9, _GA102),
    "rtx6000-ada": Device("RTX 6000 Ada", 48 * 10**9, 364.2e12, 91.1e12, 960e9, 31.5e9, _ADA),
    "rtx3090": Device("RTX 3090", 24 * 10**9, 71e12, 35.6e12, 936e9, 31.5e9, _GA102),
    "rtx4090": Device("RTX 4090", 24 * 10**9, 165.2e12, 82.6e12, 1008e9, 31.5e9, _ADA),
    "rtx5090": Device(
        "RTX 5090", 32 * 10**9, 209.5e12, 104.8e12, 1792e9, 63e9, "NVIDIA RTX Blackwell architecture white paper"
    ),
}

# Shares of the published figures, fitted to the 16 stages of results/gpu_step, measured on an H200
# (benchmarks/seconds.py --h200 fits them again). For other devices they are a guess.
PRODUCTS = 0.41
ATTENTION = 0.6  # counted as if the causal mask left nothing out; held at this in the fit
BYTES = 0.49
OPERANDS = 12.0  # nearly all that products read and write is moved while they compute
BUS = 0.8  # assumed
LAUNCHES = 1 / 8e-6  # a second, by the host; assumed: the measured stages do not tell it


def published_speeds(name: str) -> Speeds:
    """The speeds of a device of ``DEVICES``, by what was fitted to an H200."""
    device = DEVICES[name]
    rates = {
        "bf16 products": PRODUCTS * device.bf16_flops,
        "fp32 products": PRODUCTS * device.fp32_flops,
        "bf16 attention": ATTENTION * device.bf16_flops,
        "fp32 attention": ATTENTION * device.fp32_flops,
        "operands": OPERANDS * device.bandwidth,
        "bus": BUS * device.bus,
        "host update": HOST_UPDATE,
        "launches": LAUNCHES,
    }
    per_second = {kind: rates.get(kind, BYTES * device.bandwidth) for kind in KINDS}
    fitted = "shares of its published figures fitted to measured steps"
    guessed = "published figures, at the shares of them that an H200 reached; not measured on this device"
    return Speeds(name, per_second, asynchronous=True, source=fitted if name == "h200" else guessed)
