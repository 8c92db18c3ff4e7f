from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .base import Positive


@dataclass
class Profiling:
    """`torch.profiler` traces and memory snapshots, under `job.dump_folder`/profile."""

    enable_profiling: bool = False
    """Write a trace of one step every `profile_freq` steps, on every rank."""
    profile_freq: Annotated[int, Positive] = 10
    """Steps between traces."""
    enable_memory_snapshot: bool = False
    """Write CUDA memory snapshots every `profile_freq` steps, and when memory runs out."""
