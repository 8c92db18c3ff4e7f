from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from .base import Positive


@dataclass
class Profiling:
    """`torch.profiler` traces and memory snapshots, under `job.dump_folder`/profile."""

    enable_profiling: bool = False
    """Write a trace of one step every `profile_freq` steps."""
    profile_freq: Annotated[int, Positive] = 10
    """Steps between traces."""
    enable_memory_snapshot: bool = False
    """Write CUDA memory snapshots every `profile_freq` steps, and when memory runs out."""
    ranks: list[int] = field(default_factory=list)
    """The ranks that write traces and snapshots; empty: the first 64, since each writes up to
    100 MB at a time. When memory runs out, any rank writes a snapshot."""
