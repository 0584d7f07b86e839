"""Published specifications of devices."""

from __future__ import annotations

from dataclasses import dataclass

_A100 = "NVIDIA A100 data sheet (SXM)"
_H100 = "NVIDIA H100 data sheet"
_B200 = "NVIDIA DGX B200 data sheet"
_GA102 = "NVIDIA Ampere GA102 architecture white paper, appendix A"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A"


@dataclass(frozen=True)
class Device:
    """The manufacturer's figures for a device."""

    title: str  # PyTorch's name for it, without "NVIDIA" and "GeForce"
    memory_bytes: int
    bf16_flops: float  # FLOP/s of dense matmuls with fp32 accumulation
    fp32_flops: float  # FLOP/s without tensor cores
    bandwidth: float  # bytes per second of its memory
    bus: float  # bytes per second to or from the host, in one direction
    source: str
    node_bandwidth: float | None = None  # of NVLink, in bytes per second and one direction
    network_bandwidth: float | None = None  # bytes per second to other nodes, through its own network card

    @property
    def bandwidth_in_node(self) -> float:
        """Bytes per second to other devices of its node."""
        return self.node_bandwidth or self.bus

    def flops(self, precision: str) -> float:
        """Peak FLOP/s in "bf16" or "fp32"."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


# Links between devices: DGX A100 (HDR InfiniBand), DGX H100, H200 and B200 (NDR); data sheets give NVLink's rate as the
# sum of both directions.
# Bus: 31.5 GB/s in one direction for PCIe 4.0 x16, 63 GB/s for PCIe 5.0 x16.
DEVICES = {
    "a100-40gb": Device("A100-SXM4-40GB", 40 * 10**9, 312e12, 19.5e12, 1555e9, 31.5e9, _A100),
    "a100-80gb": Device("A100-SXM4-80GB", 80 * 10**9, 312e12, 19.5e12, 2039e9, 31.5e9, _A100, 300e9, 25e9),
    "a10": Device("A10", 24 * 10**9, 125e12, 31.2e12, 600e9, 31.5e9, "NVIDIA A10 data sheet"),
    "h100": Device("H100 80GB HBM3", 80 * 10**9, 989e12, 67e12, 3350e9, 63e9, f"{_H100} (SXM)", 450e9, 50e9),
    "h100-pcie": Device("H100 PCIe", 80 * 10**9, 756e12, 51e12, 2000e9, 63e9, f"{_H100} (PCIe)"),
    "h200": Device("H200", 141 * 10**9, 989e12, 67e12, 4800e9, 63e9, "NVIDIA H200 data sheet (SXM)", 450e9, 50e9),
    "b200": Device(
        "B200", 180 * 10**9, 2250e12, 75e12, 8000e9, 63e9, "NVIDIA DGX B200 data sheet, an eighth of it", 900e9, 50e9
    ),
    "l4": Device("L4", 24 * 10**9, 121e12, 30.3e12, 300e9, 31.5e9, "NVIDIA L4 data sheet, without sparsity"),
    "l40s": Device("L40S", 48 * 10**9, 362e12, 91.6e12, 864e9, 31.5e9, "NVIDIA L40S data sheet"),
    "a6000": Device("RTX A6000", 48 * 10**9, 154.8e12, 38.7e12, 768e9, 31.5e9, _GA102),
    "rtx6000-ada": Device("RTX 6000 Ada Generation", 48 * 10**9, 364.2e12, 91.1e12, 960e9, 31.5e9, _ADA),
    "rtx3090": Device("RTX 3090", 24 * 10**9, 71e12, 35.6e12, 936e9, 31.5e9, _GA102),
    "rtx4090": Device("RTX 4090", 24 * 10**9, 165.2e12, 82.6e12, 1008e9, 31.5e9, _ADA),
    "rtx5090": Device(
        "RTX 5090", 32 * 10**9, 209.5e12, 104.8e12, 1792e9, 63e9, "NVIDIA RTX Blackwell architecture white paper"
    ),
}


def published_flops(name: str, precision: str) -> float | None:
    """Published peak FLOP/s, in "bf16" or "fp32", of the device with this PyTorch name; None if it is not listed."""
    title = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next((device.flops(precision) for device in DEVICES.values() if device.title == title), None)
