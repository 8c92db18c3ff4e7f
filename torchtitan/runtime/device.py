"""The device that this process computes on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from torchtitan.errors import ConfigError
from torchtitan.runtime.world import local_rank, local_world_size


def device_type() -> str:
    """Return `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device() -> torch.device:
    """Return the device of this process; torchrun gives each process of a host its own."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def device_name() -> str:
    """Return this process's device for display: `NVIDIA H100 80GB HBM3`, `CPU`."""
    return torch.cuda.get_device_name(device()) if device_type() == "cuda" else "CPU"


def check_devices() -> None:
    """Raise `ConfigError` if there are GPUs that PyTorch cannot use, or too few of them.

    An empty CUDA_VISIBLE_DEVICES means that none is wanted.
    """
    if device_type() == "cuda":
        processes, gpus = max(local_world_size(), local_rank() + 1), torch.cuda.device_count()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        # With torchrun's --virtual-local-rank, each process sees one GPU, its own.
        own = gpus == 1 and chosen is not None and local_rank() == 0
        if processes > gpus and not own:
            by = "" if chosen is None else f" (CUDA_VISIBLE_DEVICES is {chosen!r})"
            raise ConfigError(
                f"{processes} processes on {socket.gethostname()}, which has only {gpus} GPUs for "
                f"them{by}: each process needs its own GPU. Start at most {gpus} on this host "
                "(--nproc-per-node of torchrun)"
            )
    elif torch.version.cuda and _gpu_files() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ConfigError(
            f"{socket.gethostname()} has a GPU ({_gpu_files()[0]}), but PyTorch {torch.__version__}"
            f" cannot use it: {_why_not()}. To run on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
        )


def _gpu_files() -> list[Path]:
    """Return the device files of the NVIDIA GPUs given to this machine or container."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def _why_not() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"it finds no device of CUDA {torch.version.cuda}"
