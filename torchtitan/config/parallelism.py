from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import Positive, Range


@dataclass
class Parallelism:
    """How the ranks share the work. The product of the degrees is the world size."""

    data_parallel_replicate_degree: Annotated[int, Positive] = 1
    """Replicas of the model (DDP, or HSDP together with sharding)."""
    data_parallel_shard_degree: Annotated[int, Range(ge=1, special=(-1,))] = -1
    """Ranks that share parameters, gradients and optimizer state (FSDP2). -1: all that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after the forward pass. `default` frees all but the last layers."""
    tensor_parallel_degree: Annotated[int, Positive] = 1
    """Ranks that share each layer's matrices."""
    disable_loss_parallel: bool = False
    """Gather the logits under tensor parallel instead of computing the loss on their shards."""
