"""Reports the device's peak FLOP/s, the peak memory of the run, and the cores that it may use."""

from __future__ import annotations

import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from torchtitan.runtime.device import device_type

# Dense bf16 matrix products with fp32 accumulation, FLOP/s, as in the vendors' data sheets (figures
# "with sparsity" halved). The first pattern found in the device's name counts. MFU is not reported
# for a device that is not listed: no figure is better than a wrong one.
_BF16_PEAK_FLOPS = [
    (r"\bGB200\b", 2.5e15),
    (r"\bB200\b", 2.25e15),
    (r"\bH200 NVL\b", 835e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b.*\bHBM3\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090$", 165.2e12),
    (r"\bRTX 3090$", 71e12),
    (r"\bMI355X\b", 2516.6e12),
    (r"\bMI325X\b", 1307.4e12),
    (r"\bMI300X\b", 1307.4e12),
    (r"\bMI250X\b", 191.5e12),  # half a card: PyTorch sees each of its two dies as a device
]


def cores() -> int:
    """Count the cores that this process may use: a job often has a share of a large host."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bf16_peak_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device, or None if it is unknown.

    `device_name` is the result of `torch.cuda.get_device_name()`. A MIG slice has no figure, since
    it is only part of the device.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, flops in _BF16_PEAK_FLOPS:
        if re.search(pattern, device_name):
            return flops
    return None


def this_device_peak_flops() -> float | None:
    """Return `bf16_peak_flops` of this process's device; None on CPU."""
    if device_type() == "cpu":
        return None
    return bf16_peak_flops(torch.cuda.get_device_name())


@dataclass(frozen=True)
class PeakMemory:
    """The most memory this process has held since it started."""

    bytes: int
    """On CUDA, bytes in tensors; on CPU, resident set of the process."""
    reserved_percent: float | None
    """On CUDA, the caching allocator's share of the device's memory; None on CPU."""


def peak_memory() -> PeakMemory:
    if device_type() == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        reserved = torch.cuda.max_memory_reserved()
        return PeakMemory(torch.cuda.max_memory_allocated(), 100 * reserved / total)
    return PeakMemory(_peak_resident_bytes(), None)


def _peak_resident_bytes() -> int:
    # On Linux `ru_maxrss` starts at the memory of the process that launched this one (torchrun).
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        if match := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
