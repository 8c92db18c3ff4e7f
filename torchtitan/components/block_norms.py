"""Measure the norms of each block's gradients and weights, to see where a training diverges."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from torchtitan.config import JobConfig
from torchtitan.distributed.blocks import blocks_of
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.grad_norm import clip_factor, sum_of_squares
from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.stage_copies import copies_of
from torchtitan.runtime.host_sum import sum_over_ranks


class BlockNorms:
    """Measures one step every `metrics.block_norm_freq` steps; nothing in the others.

    Parameters outside of blocks count under the first part of their name, such as `output`.

    Args:
        model: the whole model, before it is parallelized.
    """

    def __init__(
        self, job_config: JobConfig, model: nn.Module, parallel_dims: ParallelDims
    ) -> None:
        self._freq = job_config.metrics.block_norm_freq
        self._max_norm = job_config.training.max_norm
        self._ranks = parallel_dims.world_size // parallel_dims.pp  # that share a pipeline stage
        self._blocks = list(blocks_of(model))
        names = (self._block_of(name) for name, _ in model.named_parameters())
        self._names = list(dict.fromkeys(names))
        self._squares: torch.Tensor | None = None

    def _block_of(self, parameter: str) -> str:
        blocks = (block for block in self._blocks if parameter.startswith(f"{block}."))
        return next(blocks, parameter.partition(".")[0])

    @torch.no_grad()
    def measure(self, step: int, model_parts: list[nn.Module], grad_norm: torch.Tensor) -> None:
        """Measure the parameters and their clipped gradients if `step` is due.

        Args:
            grad_norm: norm of all gradients before clipping.
        """
        if not self._freq or step % self._freq:
            return
        # (row, block, copies of a shard) -> the shards
        shards: dict[tuple[int, str, int], list[torch.Tensor]] = defaultdict(list)
        elsewhere = copies_of(model_parts)
        for name, param in (pair for part in model_parts for pair in part.named_parameters()):
            if param in elsewhere:
                continue
            copies = self._ranks // _number_of_shards(param)
            for row, tensor in enumerate((param.grad, param)):
                if tensor is not None:
                    key = row, self._block_of(canonical_name(name)), copies
                    shards[key].append(local_tensor(tensor))
        squares = torch.zeros(2, len(self._names), dtype=torch.float64, device=grad_norm.device)
        for (row, block, copies), tensors in shards.items():
            squares[row, self._names.index(block)] += sum_of_squares(tensors) / copies
        squares[0] /= clip_factor(grad_norm, self._max_norm) ** 2
        self._squares = squares

    def metrics(self) -> dict[str, float]:
        """Return the norms of the last step measured since the last call; empty if none.

        All ranks call this.
        """
        if self._squares is None:
            return {}
        squares, self._squares = self._squares.cpu(), None  # see `StepStats.read`
        sum_over_ranks(squares)
        rows = squares.sqrt().tolist()
        return {
            f"{kind}/{name}": norm
            for kind, norms in zip(("grad_norm", "weight_norm"), rows, strict=True)
            for name, norm in zip(self._names, norms, strict=True)
        }


def _number_of_shards(tensor: torch.Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return 1
    mesh, places = tensor.device_mesh, tensor.placements
    return math.prod(mesh.size(i) for i, how in enumerate(places) if not how.is_replicate())
