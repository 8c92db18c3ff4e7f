"""Divide each sequence among the ranks of context parallelism."""

from __future__ import annotations

import torch
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


class SequenceShards:
    """Cuts a sequence into `2 * cp` equal chunks, and gives two of them to each of `cp` ranks.

    Args:
        mesh: the ranks that share each sequence; one-dimensional.
        balanced: rank `r` has chunks `r` and `2 * cp - 1 - r`, so that with a causal mask all ranks
            have equally many query-key pairs (Llama 3, arXiv:2407.21783, section 3.3.2).
            Otherwise it has the consecutive chunks `2 * r` and `2 * r + 1`.
    """

    def __init__(self, mesh: DeviceMesh, balanced: bool) -> None:
        self.mesh = mesh
        self.rank = mesh.get_local_rank()
        self.size = mesh.size()
        last = 2 * self.size - 1
        pairs = [
            (rank, last - rank) if balanced else (2 * rank, 2 * rank + 1)
            for rank in range(self.size)
        ]
        self.chunks = pairs[self.rank]
        """Numbers of this rank's chunks, ascending."""
        held = [number for pair in pairs for number in pair]
        self._in_order = [held.index(number) for number in range(2 * self.size)]

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part of a tensor: `[..., seq, ...]` -> `[..., seq / cp, ...]`.

        `dim`: the dimension of the sequence.
        """
        chunks = tensor.chunk(2 * self.size, dim)
        return torch.cat([chunks[number] for number in self.chunks], dim)

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return all ranks' parts in sequence order: all-gather; in backward, reduce-scatter.

        `[..., seq / cp, ...]` -> `[..., seq, ...]`, in dimension `dim`.
        """
        shard = DTensor.from_local(tensor, self.mesh, [Shard(dim)], run_check=False)
        gathered = shard.redistribute(placements=[Replicate()])
        chunks = gathered.to_local(grad_placements=[Partial()]).chunk(2 * self.size, dim)
        return torch.cat([chunks[place] for place in self._in_order], dim)

    def exchange(self, tensor: torch.Tensor, split_dim: int, join_dim: int) -> torch.Tensor:
        """All-to-all: rank `r` gets the `r`-th part along `split_dim` of each rank's tensor.

        The received parts are joined along `join_dim` in rank order. Differentiable.
        `[..., split, ..., join, ...]` -> `[..., split / cp, ..., join * cp, ...]`.
        """
        parts = torch.stack(tensor.chunk(self.size, split_dim))
        one_each = [1] * self.size
        received = all_to_all_single_autograd(parts, one_each, one_each, (self.mesh, 0))
        return torch.cat(received.unbind(), join_dim)
