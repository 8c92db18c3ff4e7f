from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from .base import NonNegative, Positive


@dataclass
class Profiling:
    """`torch.profiler` traces and memory snapshots, under `job.dump_folder`/profile."""

    enable_profiling: bool = False
    """Write a trace of `profiler_active` steps every `profile_freq` steps."""
    profile_freq: Annotated[int, Positive] = 10
    """Steps between traces."""
    profiler_active: Annotated[int, Positive] = 1
    """Steps in a trace: those up to a multiple of `profile_freq`, which is no less."""
    profiler_warmup: Annotated[int, NonNegative] = 2
    """Steps profiled before them, as far as there are so many, and not kept: the first ones under
    the profiler are slower than usual."""
    enable_memory_snapshot: bool = False
    """Write CUDA memory snapshots every `profile_freq` steps, and when memory runs out."""
    ranks: list[int] = field(default_factory=list)
    """The ranks that write traces and snapshots; empty: the first 64, since each writes up to
    100 MB at a time. When memory runs out, any rank writes a snapshot."""
