"""Derive all randomness from the seed and the step."""

from __future__ import annotations

import hashlib
import os

import torch


def use_deterministic_kernels() -> None:
    """Refuse kernels whose result depends on thread timing. Call before CUDA is used."""
    # cuBLAS is deterministic only with a workspace of fixed size (cuBLAS documentation, 2.1.4).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from any parts, the same in every process."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, random_rank: int) -> None:
    """Seed dropout and the like for one step, so that a resumed run draws the same numbers.

    `random_rank` is `ParallelDims.random_rank`, beyond those of other replicas.
    """
    torch.manual_seed(derive_seed(seed, "step", step, random_rank))
