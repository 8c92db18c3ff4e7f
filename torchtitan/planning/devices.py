"""Capabilities of devices, from their makers' data sheets. `h100` and `h200` are SXM modules.

PCIe cards reach each other by PCIe; NVLink bridges of pairs are left out. The GPUs of GB200 racks
are one host of 72: `--nodes-of 72`."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Device:
    """An accelerator and its connections. FLOP/s are dense; rates are for one direction."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """FLOP/s of matrix products in bfloat16."""
    float8_flops: float
    """FLOP/s in float8 and MXFP8, if the device has them."""
    float32_flops: float
    """FLOP/s in float32, without TF32, which PyTorch does not use by default."""
    bandwidth: float
    """Bytes/s of the device's memory."""
    link: float
    """Bytes/s to the other devices of its host."""
    network: float
    """Bytes/s of the device's share of the host's network cards."""
    capability: tuple[int, int]
    """What PyTorch tells as its compute capability."""
    host_memory_reserved: float = 1.5e9
    """Bytes that the CUDA context, NCCL's buffers and fragmentation take from `memory`."""

    matmul_efficiency: float = 0.75
    """Share of `flops` that large matrix products reach (measured on an H100: 0.65 to 0.81 alone,
    0.76 in training steps of Llama 3 1B and 3B)."""
    attention_efficiency: float = 0.45
    """Share of `flops` that fused attention reaches, forward and backward (measured on an H100,
    cuDNN's kernels at 4,096 tokens: 0.39 for heads of 64 features, 0.49 for 128)."""
    bandwidth_efficiency: float = 0.7
    """Share of `bandwidth` that element-wise kernels reach (measured on an H100: 0.9 for a copy,
    0.78 for fused AdamW, 0.7 for the rest of a step of Llama 3 1B)."""
    link_efficiency: float = 0.75
    """Share of `link` and `network` that collectives of many megabytes reach."""
    latency: float = 2e-5
    """Seconds that a collective takes before bytes flow."""
    hop: float = 2e-6
    """Seconds that each rank on another host adds to a ring (not measured; NCCL's table of
    latencies gives 1.9e-6 by NVLink and 4e-6 by the network for its protocol LL128)."""
    launch: float = 4e-6
    """Seconds that the host takes to launch a kernel."""


GIB = 2**30
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 79.2 * GIB, 312e12, 0.0, 19.5e12, 2.04e12, 300e9, 25e9, (8, 0)),
        Device("a100-40gb", 39.4 * GIB, 312e12, 0.0, 19.5e12, 1.56e12, 300e9, 25e9, (8, 0)),
        Device("l40s", 44.4 * GIB, 362e12, 733e12, 91.6e12, 0.86e12, 32e9, 25e9, (8, 9)),
        Device("h100-pcie", 79.1 * GIB, 756e12, 1513e12, 51e12, 2.0e12, 64e9, 50e9, (9, 0)),
        Device("h100", 79.1 * GIB, 989e12, 1979e12, 67e12, 3.35e12, 450e9, 50e9, (9, 0)),
        Device("h200", 139.8 * GIB, 989e12, 1979e12, 67e12, 4.8e12, 450e9, 50e9, (9, 0)),
        Device("b200", 178.0 * GIB, 2250e12, 4500e12, 75e12, 8.0e12, 900e9, 50e9, (10, 0)),
        Device("gb200", 184.0 * GIB, 2500e12, 5000e12, 80e12, 8.0e12, 900e9, 50e9, (10, 0)),
        Device("mi300x", 191.5 * GIB, 1307e12, 2615e12, 163e12, 5.3e12, 448e9, 50e9, (9, 4)),
    )
}


def get_device(name: str) -> Device:
    """Return the device of a name. Raises `ConfigError` if it is unknown."""
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: no such device.{did_you_mean(name, DEVICES)}")
    return DEVICES[name]
