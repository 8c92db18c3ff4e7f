"""Compares a rank's recording with its part of the reference, and locates differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchtitan.distributed.context_parallel import sequence_shards
from torchtitan.distributed.dtensor import local_tensor, shard_offsets
from torchtitan.tools.text import ranges
from torchtitan.train import Trainer

from .batches import BATCH
from .observe import Outputs
from .reference import Tensors

Indices = list[torch.Tensor]
"""For each dimension of a tensor, the indices of the whole tensor that a rank's part covers."""


@dataclass(frozen=True)
class Difference:
    """One tensor that differs from the reference."""

    name: str
    relative: float
    """Norm of the difference over the norm of the reference; NaN if a number is not finite."""
    where: str = ""
    """The differing part of the tensor, in words."""
    problem: str = ""
    """The problem, if it is not a number."""

    def __str__(self) -> str:
        part = f" in {self.where}" if self.where else ""
        return self.problem or f"by {self.relative:.2g} of its norm{part}"


class RankPart:
    """The part of the batch on this rank, which allows comparing plain tensors too."""

    def __init__(self, trainer: Trainer) -> None:
        dims, mesh = trainer.parallel_dims, trainer.parallel_dims.world_mesh
        self.seq_len = trainer.job_config.training.seq_len
        rows = torch.arange(BATCH).chunk(dims.dp)
        self._rows = rows[trainer.dp_rank]
        sequence = torch.arange(self.seq_len)
        if trainer.cp_mesh is not None:
            sequence = sequence_shards(trainer.cp_mesh, trainer.job_config).shard(sequence, 0)
        self._sequence = sequence
        self._tp = dims.tp
        self._tp_rank = mesh["tp"].get_local_rank() if dims.tp_enabled else 0

    def indices(self, shape: Sequence[int], part: torch.Tensor) -> Indices | None:
        """Return the place of `part` in the whole `[batch, seq, ...]` or `[batch, heads, seq, _]`.

        A DTensor is placed by its placements. In a plain tensor, each dimension is the batch, the
        sequence, or features, which tensor parallelism may divide. None if it cannot be placed.
        """
        sequence = next((d for d in (1, 2) if len(shape) > d and shape[d] == self.seq_len), None)
        if len(shape) != part.ndim or shape[0] != BATCH or sequence is None:
            return None
        indices = [torch.arange(size) for size in shape]
        indices[0], indices[sequence] = self._rows, self._sequence
        if isinstance(part, DTensor):
            of_ranks = torch.Size(map(len, indices))
            if part.shape != of_ranks or {*map(type, part.placements)} - {Shard, Replicate}:
                return None
            begins = shard_offsets(of_ranks, part.device_mesh, part.placements)
            part = part.to_local()
            places = zip(indices, begins, part.shape, strict=True)
            indices = [whole[begin : begin + size] for whole, begin, size in places]
        else:
            for dim in range(1, part.ndim):
                if len(indices[dim]) == self._tp * part.shape[dim]:
                    indices[dim] = indices[dim].chunk(self._tp)[self._tp_rank]
        fits = [len(places) for places in indices] == list(part.shape)
        return indices if fits else None


def compare_outputs(
    outputs: Outputs, reference: Outputs, part: RankPart, tolerance: float
) -> tuple[list[Difference], int, int]:
    """Return the modules whose output differs, in forward order; numbers compared; left out."""
    differences, compared, left_out = [], 0, 0
    for name, whole in reference.items():
        calls = outputs.get(name)
        if not calls:
            continue  # in another stage
        local = _join(calls)
        expected = whole[0]
        indices = None
        if len(whole) == 1 and local is not None:
            indices = part.indices(expected.shape, local)
        if local is None or indices is None:
            left_out += 1
            continue
        compared += 1
        local = local_tensor(local)
        for dim, places in enumerate(indices):
            expected = expected.index_select(dim, places)
        relative = _relative(local, expected, float(expected.norm()))
        if not relative <= tolerance:
            where = _wrong_places(local, expected, indices, whole[0].shape, part.seq_len, tolerance)
            differences.append(Difference(name, relative, where))
    return differences, compared, left_out


def _join(calls: list[torch.Tensor]) -> torch.Tensor | None:
    """Join the micro-batches of a tensor along the batch."""
    if len(calls) == 1:
        return calls[0]
    first = calls[0]
    if not all(type(call) is type(first) and call.ndim == first.ndim > 0 for call in calls):
        return None
    if any(call.shape[1:] != first.shape[1:] for call in calls):
        return None
    if not isinstance(first, DTensor):
        return torch.cat(calls)
    local = torch.cat([cast(DTensor, call).to_local() for call in calls])
    return DTensor.from_local(local, first.device_mesh, first.placements, run_check=False)


def compare_tensors(
    tensors: Tensors, reference: Tensors, tolerance: float, floor: float = 0.0
) -> tuple[list[Difference], float]:
    """Find the tensors that differ from this rank's part of those in `reference`, by name.

    Args:
        tolerance: norm of the difference over the norm of the whole tensor in the reference.
        floor: a root mean square. A tensor with a smaller one is compared relative to `floor`,
            since values that should be 0 are rounding errors in the reference too.

    Returns:
        The differences in the order of the reference, and the largest relative difference of all
        tensors.
    """
    differences, largest = [], 0.0
    for name, whole in reference.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != whole.shape:
            problem = f"its shape is {list(tensor.shape)}, not {list(whole.shape)}"
            differences.append(Difference(name, math.inf, problem=problem))
            largest = math.inf
            continue
        local, expected = tensor, whole
        if isinstance(tensor, DTensor):
            local, layout = tensor.to_local(), (tensor.device_mesh, tensor.placements)
            # Cut without communication.
            expected = distribute_tensor(whole.clone(), *layout, src_data_rank=None).to_local()
        norm = float(whole.double().norm()) if whole.is_floating_point() else 0.0
        norm = max(norm, floor * whole.numel() ** 0.5)
        relative = _relative(local, expected, norm)
        largest = max(largest, relative) if not math.isnan(relative) else relative
        if not relative <= tolerance:
            placed = "" if not isinstance(tensor, DTensor) else _placed(tensor)
            problem = "" if local.any() else "it is 0"
            differences.append(Difference(name, relative, placed, problem))
    return differences, largest


def _relative(local: torch.Tensor, expected: torch.Tensor, norm: float) -> float:
    if not expected.is_floating_point():
        return 0.0 if torch.equal(local, expected) else math.inf
    error = float((local.double() - expected.double()).norm())
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def _placed(tensor: DTensor) -> str:
    sharded = [
        f"{name} {rank} of {size}"
        for name, size, rank, placement in zip(
            tensor.device_mesh.mesh_dim_names or (),
            tensor.device_mesh.shape,
            tensor.device_mesh.get_coordinate() or (),
            tensor.placements,
            strict=False,
        )
        if not isinstance(placement, Replicate)
    ]
    return f"the shard {', '.join(sharded)}" if sharded else ""


def _wrong_places(
    local: torch.Tensor,
    expected: torch.Tensor,
    indices: Indices,
    shape: Sequence[int],
    seq_len: int,
    tolerance: float,
) -> str:
    """Format the places of the whole tensor that differ: `rows 4-7, tokens 32-63`."""
    error = (local.double() - expected.double()).abs()
    scale = expected.double().square().mean().sqrt()
    wrong = ~(error <= tolerance * scale)
    if not wrong.any():
        wrong = error == error.max()
    names = ["sequences", "tokens", *["features"] * (len(shape) - 2)]
    if len(shape) == 4 and shape[1] != seq_len:
        names = ["sequences", "heads", "tokens", "features"]
    parts = []
    for dim, (name, places) in enumerate(zip(names, indices, strict=True)):
        others = [d for d in range(wrong.ndim) if d != dim]
        found = places[wrong.any(dim=others)].tolist()
        if len(found) < shape[dim]:
            parts.append(f"{name} {ranges(found)}")
    return ", ".join(parts)
