from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .base import NonNegative, Positive


@dataclass
class FaultTolerance:
    """Replica groups that may die and come back while the others train on (torchft)."""

    enable: bool = False
    """Train as one of several replica groups. Each is a job of its own, under torchrun; they meet
    by the server in the environment variable TORCHFT_LIGHTHOUSE. See docs/fault_tolerance.md."""
    replica_id: Annotated[int, NonNegative] = 0
    """Number of this replica group, from 0. It writes to `job.dump_folder`/replica-N."""
    group_size: Annotated[int, Positive] = 1
    """Replica groups of the run when none is missing; they share out `global_batch_size`."""
    min_replica_size: Annotated[int, Positive] = 1
    """With fewer replica groups, training waits."""

    @property
    def replica(self) -> str:
        """Name of this replica group, and of its folders."""
        return f"replica-{self.replica_id}"
