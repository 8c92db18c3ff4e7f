from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .base import Positive, Range


@dataclass
class Comm:
    """Process groups."""

    timeout_seconds: Annotated[int, Positive] = 600
    """A collective that waits longer than this ends the run."""
    hang_seconds: Annotated[int, Range(ge=1, special=(-1, 0))] = -1
    """After so long without progress, write all stacks to `job.dump_folder`/hang and name the late
    rank; -1: half of timeout_seconds; 0: never. The run goes on until timeout_seconds."""
