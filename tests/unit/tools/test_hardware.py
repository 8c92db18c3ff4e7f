"""Peak FLOP/s by device name, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from torchtitan.tools import hardware
from torchtitan.tools.hardware import bf16_peak_flops, peak_memory, this_device_peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A30", 165),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI355X", 2516.6),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert bf16_peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",  # not an A100
        "NVIDIA GeForce RTX 4090 Laptop GPU",  # a smaller chip
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",  # a part of one
        "NVIDIA H100 64GB HBM2",  # a variant with other clocks
        "Tesla V100-SXM2-16GB",  # no bf16 matrix products
        "",
    ],
)
def test_devices_without_a_known_peak(name: str) -> None:
    assert bf16_peak_flops(name) is None


def test_cpu_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "device_type", lambda: "cpu")
    assert this_device_peak_flops() is None


def test_cuda_peak_comes_from_the_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert this_device_peak_flops() == 989e12


def test_cpu_memory_is_the_peak_of_the_process() -> None:
    """In a process of its own, since the peak of this one may lie far above what it holds now."""
    code = (
        "from torchtitan.tools.hardware import peak_memory\n"
        "before = peak_memory()\n"
        "block = b'x' * 300_000_000\n"
        "del block\n"
        "after = peak_memory()\n"
        "print(after.bytes - before.bytes, after.reserved_percent)\n"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown, reserved_percent = output.stdout.split()
    assert 250_000_000 < int(grown) < 400_000_000
    assert reserved_percent == "None"


def test_cuda_memory_is_that_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 20 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    memory = peak_memory()
    assert memory.bytes == 10 * 2**30
    assert memory.reserved_percent == pytest.approx(25)
