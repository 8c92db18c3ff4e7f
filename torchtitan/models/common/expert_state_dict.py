"""Exchange experts with Hugging Face, whose files store each expert's matrices separately.

A sharded model exchanges without a full copy on any rank: each rank converts its own experts, so
that ranks have different names in their Hugging Face state dicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchtitan.distributed.dtensor import local_tensor
from torchtitan.errors import CheckpointError

from .state_dict import RenamingAdapter, numbers_of, pattern_of, rename


class ExpertsAdapter(RenamingAdapter):
    """A `RenamingAdapter` that also splits expert weights into matrices and joins these.

    `from_hf` gives expert weights the layout in which `to_hf` saw them last; if it saw none, it
    returns whole tensors. It raises `CheckpointError` if an expert is missing.
    """

    expert_names: ClassVar[Mapping[str, str]]
    """Our name of a weight `[num_experts, ...]` -> theirs of one expert's, with one more `{}`."""
    training_state: ClassVar[frozenset[str]] = frozenset(
        {"layers.{}.moe.router.load", "layers.{}.moe.router.selection_bias"}
    )
    """Tensors for which Hugging Face's layout has no place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._experts_from_hf = {theirs: ours for ours, theirs in self.expert_names.items()}
        self._sharded: dict[str, DTensor] = {}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        converted = {}
        for key, value in state_dict.items():
            pattern = pattern_of(key)
            if pattern in self.expert_names:
                if isinstance(value, DTensor):
                    self._sharded[key] = value
                for number, matrix in split_experts(value).items():
                    converted[self.expert_names[pattern].format(*numbers_of(key), number)] = matrix
            elif pattern not in self.training_state:
                converted[rename(key, self._to_hf)] = value
        return converted

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        others: dict[str, Any] = {}
        experts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        for key, value in state_dict.items():
            ours = self._experts_from_hf.get(pattern_of(key))
            if ours is None:
                others[key] = value
            else:
                *layer, number = numbers_of(key)
                experts[ours.format(*layer)][int(number)] = value
        converted = super().from_hf(others)
        for key, matrices in experts.items():
            converted[key] = self._join(key, matrices)
        return converted

    def _join(self, key: str, matrices: dict[int, torch.Tensor]) -> torch.Tensor:
        like = self._sharded.get(key)
        wanted = range(self.model_args.num_experts) if like is None else expert_numbers(like)
        for number in wanted:
            if number not in matrices:
                theirs = self.expert_names[pattern_of(key)]
                raise CheckpointError(
                    f"checkpoint: tensor {theirs.format(*numbers_of(key), number)!r} is missing"
                )
        if like is None:
            if len(matrices) > len(wanted):
                raise CheckpointError(
                    f"checkpoint: expert {max(matrices)} of {key!r}, but the model has only "
                    f"{len(wanted)} experts"
                )
            return torch.stack([matrices[number] for number in wanted])
        joined = cast(DTensor, torch.empty_like(like))
        for target, number in zip(joined.to_local(), wanted, strict=True):
            target.copy_(local_tensor(matrices[number]))
        return joined


def split_experts(weight: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the matrices of this rank's experts, by the expert's number, as views of `weight`.

    Args:
        weight: `[num_experts, rows, columns]`. A DTensor may also be sharded over other dimensions
            than the first; then the matrices are DTensors.
    """
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        return dict(enumerate(weight))
    within = {
        name: Shard(cast(Shard, placement).dim - 1)
        for name, placement in zip(
            weight.device_mesh.mesh_dim_names or (), weight.placements, strict=True
        )
        if getattr(placement, "dim", 0) > 0
    }
    matrices = dict(zip(expert_numbers(weight), weight.to_local(), strict=True))
    if not within:
        return matrices
    mesh, layout = weight.device_mesh[tuple(within)], tuple(within.values())
    return {
        number: DTensor.from_local(matrix, mesh, layout, run_check=False)
        for number, matrix in matrices.items()
    }


def expert_numbers(weight: DTensor) -> list[int]:
    """Return the numbers of the experts whose matrices, or parts of them, are on this rank."""
    placements = [p if getattr(p, "dim", -1) == 0 else Replicate() for p in weight.placements]
    numbers = torch.arange(weight.size(0))
    return (
        distribute_tensor(numbers, weight.device_mesh, placements, src_data_rank=None)
        .to_local()
        .tolist()
    )
