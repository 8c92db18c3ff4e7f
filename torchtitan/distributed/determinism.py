"""Derive all randomness from the seed and the step."""

from __future__ import annotations

import hashlib
import os

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import _random


def use_deterministic_kernels() -> None:
    """Refuse kernels whose result depends on thread timing. Call before CUDA is used."""
    # cuBLAS is deterministic only with a workspace of fixed size (cuBLAS documentation, 2.1.4).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The switches of H100 hosts, which NCCL lets add up, do not promise an order.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def keep_random_states(mesh: DeviceMesh) -> None:
    """Let DTensors draw by the random state of their rank, which `seed_step` has set.

    Otherwise the first dropout of a DTensor on a GPU copies that of rank 0 to all ranks. Data ranks
    then drop alike, and pipeline stages wait for each other: the later ones, for the output of the
    first one, and this for their part in the copy (torch 2.11 to 2.13).
    """
    if mesh.device_type == "cuda":
        _random.manual_seed(torch.initial_seed(), mesh)  # also stops the copy


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from any parts, the same in every process."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, random_rank: int) -> None:
    """Seed dropout and the like for one step, so that a resumed run draws the same numbers.

    `random_rank` is `ParallelDims.random_rank`, beyond those of other replicas.
    """
    torch.manual_seed(derive_seed(seed, "step", step, random_rank))
