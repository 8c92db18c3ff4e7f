"""What a plan says of a run: the needs of each pipeline rank, and the throughput of the whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchtitan.config import JobConfig
from torchtitan.config.batch import BatchSizes, batch_sizes
from torchtitan.distributed.parallel_dims import ParallelDims

from .devices import Device
from .memory import Memory
from .roofline import Traffic
from .schedule import Timeline


@dataclass
class RankPlan:
    """Needs of a rank at one place in the pipeline."""

    pp_rank: int
    stages: list[int]
    memory: Memory
    """At its peak."""
    compute_seconds: float
    """Matrix products in a step."""
    other_seconds: float
    """Other operations, bound by memory bandwidth, and the optimizer."""
    waiting_seconds: float
    """Waiting for collectives that do not overlap, or only in part."""
    traffic: list[Traffic] = field(default_factory=list)

    @property
    def peak(self) -> float:
        return self.memory.total


@dataclass
class Plan:
    """The expected behaviour of a whole run."""

    config: JobConfig
    device: Device
    dims: ParallelDims
    ranks: list[RankPlan]
    step_seconds: float
    pass_seconds: float
    """What each pass of a data rank adds to a step."""
    tokens_per_step: int
    """Tokens that one replica group trains on in a step."""
    flops_per_token: int
    nparams: int
    accumulation_steps: int
    timeline: Timeline | None = None

    @property
    def world_size(self) -> int:
        return self.dims.world_size

    @property
    def replica_groups(self) -> int:
        """Groups of `world_size` devices each (`fault_tolerance`). The plan is for one of them."""
        groups = self.config.fault_tolerance
        return groups.group_size if groups.enable else 1

    @property
    def batch_sizes(self) -> BatchSizes:
        """The sequences of each step of all groups."""
        return batch_sizes(self.config, self.dims.dp * self.replica_groups)

    @property
    def tokens_per_second(self) -> float:
        """The throughput of one device."""
        return self.tokens_per_step / self.step_seconds / self.world_size

    @property
    def mfu(self) -> float:
        return self.tokens_per_second * self.flops_per_token / self.device.flops

    @property
    def bubble(self) -> float:
        return self.timeline.bubble if self.timeline else 0.0

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs the most."""
        return max(rank.peak for rank in self.ranks)

    @property
    def room(self) -> float:
        """Bytes left on the rank that needs the most; negative if the run does not fit."""
        return self.available - self.peak

    @property
    def available(self) -> float:
        """Bytes of a device that are available to tensors."""
        return self.device.memory - self.device.host_memory_reserved

    @property
    def busiest(self) -> RankPlan:
        """The rank that computes for the longest time."""
        return max(self.ranks, key=lambda r: r.compute_seconds + r.other_seconds)

    @property
    def bound(self) -> str:
        """The part that takes most of the time."""
        rank = self.busiest
        shares = {
            "matrix products": rank.compute_seconds,
            "memory bandwidth": rank.other_seconds,
            "communication": rank.waiting_seconds,
            "pipeline bubble": self.bubble * self.step_seconds,
        }
        return max(shares, key=lambda name: shares[name])
