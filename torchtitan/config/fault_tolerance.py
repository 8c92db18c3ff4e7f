from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .base import NonNegative, Positive


@dataclass
class FaultTolerance:
    """Replica groups that may fail and rejoin while the others keep training (torchft)."""

    enable: bool = False
    """Train as one of several replica groups. Each is a separate torchrun job; they connect through
    the server in the environment variable TORCHFT_LIGHTHOUSE. See docs/fault_tolerance.md."""
    replica_id: Annotated[int, NonNegative] = 0
    """Index of this replica group, from 0. The group writes to `job.dump_folder`/replica-N."""
    group_size: Annotated[int, Positive] = 1
    """Number of replica groups when none is missing; they share `global_batch_size`."""
    min_replica_size: Annotated[int, Positive] = 1
    """Training waits while there are fewer replica groups than this."""

    @property
    def replica(self) -> str:
        """Name of this replica group and of its folders."""
        return f"replica-{self.replica_id}"
