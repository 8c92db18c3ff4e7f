"""GPUs that cannot be used, too few of them, or on some hosts only: one message, and no hang."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchtitan.errors import ConfigError
from torchtitan.generation.load import process_group
from torchtitan.runtime import device
from torchtitan.runtime.device import check_devices, device_name
from torchtitan.runtime.process_group import _require_same_device, init_distributed


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One process on a host with a GPU; PyTorch is built for CUDA, but cannot use it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "_gpu_files", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\n")

    monkeypatch.setattr(torch.cuda, "init", init)
    return monkeypatch


def with_gpus(host: pytest.MonkeyPatch, count: int) -> None:
    host.setattr(torch.cuda, "is_available", lambda: True)
    host.setattr(torch.cuda, "device_count", lambda: count)


def test_a_driver_that_is_too_old_does_not_train_on_the_cpu(host) -> None:
    why = r"has a GPU \(/dev/nvidia0\).*driver on your system is too old \(found version 12040\)\."
    with pytest.raises(ConfigError, match=why):
        init_distributed(60)
    with pytest.raises(ConfigError, match=why), process_group():
        pass


@pytest.mark.parametrize("wanted", ["hidden", "none there", "a PyTorch without CUDA"])
def test_the_cpu_serves_where_it_is_wanted(host, wanted: str) -> None:
    if wanted == "hidden":
        host.setenv("CUDA_VISIBLE_DEVICES", "")
    elif wanted == "none there":
        host.setattr(device, "_gpu_files", lambda: [])
    else:
        host.setattr(torch.version, "cuda", None)
    check_devices()
    assert device_name() == "CPU"


def test_more_processes_than_gpus(host) -> None:
    with_gpus(host, 4)
    host.setenv("LOCAL_WORLD_SIZE", "8")
    host.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(ConfigError, match=r"8 processes on .* 4 GPUs .*is '0,1,2,3'.*at most 4"):
        init_distributed(60)  # on each rank of the host, those with a GPU too
    host.setenv("LOCAL_WORLD_SIZE", "4")
    check_devices()
    host.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="5 processes"):
        check_devices()


def test_each_process_may_see_only_its_own_gpu(host) -> None:
    """As by torchrun's --virtual-local-rank."""
    with_gpus(host, 1)
    host.setenv("LOCAL_WORLD_SIZE", "8")
    host.setenv("LOCAL_RANK", "0")
    host.setenv("CUDA_VISIBLE_DEVICES", "3")
    check_devices()
    host.setenv("LOCAL_RANK", "3")  # without that option
    with pytest.raises(ConfigError, match=r"8 processes on .* 1 GPUs"):
        check_devices()
    host.setenv("LOCAL_RANK", "0")
    host.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match=r"8 processes on .* 1 GPUs"):
        check_devices()


def test_the_device_has_its_name(host) -> None:
    with_gpus(host, 4)
    host.setenv("LOCAL_RANK", "3")
    host.setattr(torch.cuda, "get_device_name", lambda device: f"H100 number {device.index}")
    assert device_name() == "H100 number 3"


def test_hosts_with_and_without_a_gpu() -> None:
    store = dist.HashStore()
    _require_same_device(store, 0, "cuda")
    _require_same_device(store, 8, "cuda")
    with pytest.raises(ConfigError, match=r"rank 9 .* computes on cpu, but rank 0 on cuda"):
        _require_same_device(store, 9, "cpu")
