from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .base import Positive, Range


@dataclass
class Parallelism:
    """How the ranks share the work. The product of the degrees, but for the experts',
    is the world size."""

    data_parallel_replicate_degree: Annotated[int, Positive] = 1
    """Replicas of the model (DDP, or HSDP together with sharding)."""
    data_parallel_shard_degree: Annotated[int, Range(ge=1, special=(-1,))] = -1
    """Ranks that share parameters, gradients and optimizer state (FSDP2). -1: all remaining."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after the forward pass. `default` frees all but the last layers;
    under pipeline parallelism it frees none, since each micro-batch would gather them again."""
    tensor_parallel_degree: Annotated[int, Positive] = 1
    """Ranks that share each layer's matrices."""
    disable_loss_parallel: bool = False
    """Gather the logits under tensor parallel instead of computing the loss on their shards."""
    disable_sequence_parallel: bool = False
    """Do not shard the sequence between the matrices under tensor parallel: each rank holds all of
    it, for models whose layers between the matrices need the whole sequence."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with its matrix products (CUDA, needs
    `compile.enable`)."""
    context_parallel_degree: Annotated[int, Positive] = 1
    """Ranks that share each sequence."""
    context_parallel_method: Literal["allgather", "ring", "ulysses"] = "allgather"
    """How queries reach the keys and values of other ranks: `allgather` gathers them, `ring` passes
    them around, `ulysses` exchanges sequence shards for heads."""
    pipeline_parallel_degree: Annotated[int, Positive] = 1
    """Ranks that share the layers."""
    pipeline_parallel_schedule: Literal[
        "GPipe",
        "1F1B",
        "Interleaved1F1B",
        "LoopedBFS",
        "InterleavedZeroBubble",
        "ZBVZeroBubble",
        "DualPipeV",
    ] = "1F1B"
    """Order of the micro-batches' forward and backward passes."""
    pipeline_parallel_schedule_csv: str = ""
    """CSV file with the schedule (one line per rank, one action per cell, in PyTorch's format), in
    place of `pipeline_parallel_schedule`."""
    pipeline_parallel_microbatch_size: Annotated[int, Positive] = 1
    """Sequences in a micro-batch; `training.local_batch_size` sequences go through the pipeline at
    a time."""
    pipeline_parallel_stages_per_rank: Annotated[int, Range(ge=1, special=(-1,))] = -1
    """Pipeline stages per rank. -1: 1 or 2, as the schedule needs."""
    pipeline_parallel_split_points: list[str] = field(default_factory=list)
    """First module of each stage after the first (`["layers.4", "layers.8"]`). Empty: stages of
    equal cost, see the weights below."""
    pipeline_parallel_embedding_weight: Annotated[float, Range(ge=0)] = 0.5
    """Cost of an embedding parameter when stages are balanced, relative to a layer parameter's cost
    of 1 (experts count by the share that a token uses): it takes memory, but no FLOPs."""
    pipeline_parallel_output_weight: Annotated[float, Range(ge=0)] = 1.0
    """Cost of a parameter of the last norm and the output layer, in the same unit."""
    expert_parallel_degree: Annotated[int, Positive] = 1
    """Ranks that share a layer's experts, taken from the dp_shard, cp and tp ranks."""
    expert_tensor_parallel_degree: Annotated[int, Positive] = 1
    """Ranks that share each expert's matrices: 1, or `tensor_parallel_degree`."""

    @property
    def smallest_world(self) -> int:
        """Number of processes that the degrees need; a degree of -1 counts as 1."""
        return (
            self.pipeline_parallel_degree
            * self.data_parallel_replicate_degree
            * max(self.data_parallel_shard_degree, 1)
            * self.context_parallel_degree
            * self.tensor_parallel_degree
        )
