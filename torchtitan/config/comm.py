from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .base import Range


@dataclass
class Comm:
    """Process groups."""

    timeout_seconds: Annotated[int, Range(ge=1, le=10**9)] = 600
    """Seconds after which a waiting collective ends the run."""
    hang_seconds: Annotated[int, Range(ge=1, special=(-1, 0))] = -1
    """Seconds without progress after which all stacks are written to `job.dump_folder`/hang and
    the late rank is named; -1: half of timeout_seconds; 0: never. The run continues until
    timeout_seconds."""
