from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import NonNegative, Positive, PositiveInKernels, Range


@dataclass
class FaultTolerance:
    """Replica groups that may fail and rejoin while the others keep training (torchft)."""

    enable: bool = False
    """Train as one of several replica groups. Each is a separate torchrun job; they connect through
    the server in the environment variable TORCHFT_LIGHTHOUSE. See docs/replica_groups.md."""
    replica_id: Annotated[int, NonNegative] = 0
    """Index of this replica group, from 0. The group writes to `job.dump_folder`/replica-N."""
    group_size: Annotated[int, Positive] = 1
    """Number of replica groups when none is missing; they share `global_batch_size`."""
    min_replica_size: Annotated[int, Positive] = 1
    """Training waits while there are fewer replica groups than this."""
    semi_sync_method: Literal["none", "diloco", "local_sgd"] = "none"
    """`none`: the groups sum their gradients in each step. Otherwise each trains on its own, and
    they meet every `sync_steps` steps: `local_sgd` averages their weights, `diloco` gives the mean
    change of the weights to an outer optimizer (arXiv:2311.08105)."""
    sync_steps: Annotated[int, Positive] = 100
    """Steps between two meetings. They also meet after the last step."""
    outer_lr: Annotated[float, PositiveInKernels] = 0.7
    """Learning rate of DiLoCo's outer optimizer, SGD with Nesterov momentum."""
    outer_momentum: Annotated[float, Range(ge=0, le=1)] = 0.9
    """Its momentum."""

    @property
    def replica(self) -> str:
        """Name of this replica group and of its folders."""
        return f"replica-{self.replica_id}"
