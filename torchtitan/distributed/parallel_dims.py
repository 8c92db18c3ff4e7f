"""The degrees of parallelism and the device meshes they span."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torchtitan.errors import ConfigError, WorldSizeError
from torchtitan.tools.multiples import divisors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from torchtitan.config.parallelism import Parallelism

CONFIG_KEYS = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}
"""Degree -> its key in the section `parallelism`."""


@dataclass(kw_only=True)
class ParallelDims:
    """Degrees of parallelism. `pp * dp_replicate * dp_shard * cp * tp` is the world size.

    Experts have no ranks of their own: `ep * etp` divides `dp_shard * cp * tp`, whose ranks hold
    the experts of a layer together (DeepSpeed-MoE, arXiv:2201.05596).

    `dp_shard = -1` takes all ranks that the other degrees leave.

    Raises:
        WorldSizeError: the degrees do not fit the world.
        ConfigError: the expert degrees do not fit the others.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    world_size: int

    def __post_init__(self) -> None:
        fixed = {name: getattr(self, name) for name in ("pp", "dp_replicate", "cp", "tp")}
        others = math.prod(fixed.values())
        written = " x ".join(
            f"{CONFIG_KEYS[name]} ({degree})"
            for name, degree in fixed.items()
            if degree > 1 or name in ("dp_replicate", "tp")
        )
        if self.dp_shard == -1:
            if self.world_size % others:
                alone = f" (`torchrun --nproc-per-node {others} -m torchtitan.train ...`)"
                raise WorldSizeError(
                    f"parallelism: {written} = {others} does not divide the world size "
                    f"{self.world_size} (number of processes). Start a multiple of {others}"
                    f"{alone if self.world_size == 1 else ''}; or the product must be one of "
                    f"{divisors(self.world_size)}"
                )
            self.dp_shard = self.world_size // others
        if others * self.dp_shard != self.world_size:
            raise WorldSizeError(
                f"parallelism: {written} x data_parallel_shard_degree ({self.dp_shard}) = "
                f"{others * self.dp_shard}, but the world size (number of processes) is "
                f"{self.world_size}. Start {others * self.dp_shard} processes, or set "
                "data_parallel_shard_degree = -1 to use the remaining ranks"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        if self.etp not in (1, self.tp):
            raise ConfigError(
                f"parallelism: expert_tensor_parallel_degree ({self.etp}) must be 1 (experts are "
                f"whole) or tensor_parallel_degree ({self.tp})"
            )
        ranks = self.dp_shard * self.cp * self.tp
        if ranks % (self.ep * self.etp):
            allowed = divisors(ranks // self.etp)  # etp divides tp
            raise ConfigError(
                f"parallelism: expert_parallel_degree ({self.ep}) x expert_tensor_parallel_degree "
                f"({self.etp}) must divide the ranks that share a layer: "
                f"data_parallel_shard_degree ({self.dp_shard}) x context_parallel_degree "
                f"({self.cp}) x tensor_parallel_degree ({self.tp}) = {ranks}. "
                f"Expert degrees that do: {allowed}"
            )

    @classmethod
    def from_config(cls, parallelism: Parallelism, world_size: int) -> ParallelDims:
        degrees = {name: getattr(parallelism, key) for name, key in CONFIG_KEYS.items()}
        return cls(**degrees, world_size=world_size)

    @property
    def dp(self) -> int:
        """Number of ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_enabled(self) -> bool:
        """Whether several ranks hold the same weights for different tokens, so that FSDP (or DDP)
        applies. These are data ranks, and context ranks, which have other parts of a sequence.
        """
        return self.dp * self.cp > 1

    @property
    def dp_replicate_enabled(self) -> bool:
        return self.dp_replicate > 1

    @property
    def dp_shard_enabled(self) -> bool:
        return self.dp_shard > 1

    @property
    def cp_enabled(self) -> bool:
        return self.cp > 1

    @property
    def tp_enabled(self) -> bool:
        return self.tp > 1

    @property
    def pp_enabled(self) -> bool:
        return self.pp > 1

    @property
    def ep_enabled(self) -> bool:
        return self.ep > 1

    @property
    def etp_enabled(self) -> bool:
        return self.etp > 1

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold the same experts for different tokens, within a replica."""
        return self.dp_shard * self.cp * self.tp // (self.ep * self.etp)

    @property
    def non_data_parallel_size(self) -> int:
        """Number of ranks that read the same data."""
        return self.pp * self.cp * self.tp

    @property
    def loss_copies(self) -> int:
        """Number of ranks that compute the same loss; in a pipeline, only the last stage does."""
        return self.tp

    @property
    def pp_rank(self) -> int:
        """This rank's place in the pipeline. Needs an initialised process group."""
        return self.world_mesh["pp"].get_local_rank() if self.pp_enabled else 0

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this is the first of the ranks that have the same pipeline stages: the one to
        tell what all of them find. Needs an initialised process group.
        """
        from torch.distributed import get_rank

        return get_rank() % (self.world_size // self.pp) == 0

    @property
    def random_rank(self) -> int:
        """Number of this rank among those that draw different random numbers.

        They have other tokens (data, context) or layers (pipeline). Ranks of tensor parallelism,
        the last dimension of the mesh, draw alike. Needs an initialised process group.
        """
        from torch.distributed import get_rank

        return get_rank() // self.tp

    def __str__(self) -> str:
        """Return `dp_shard 4, tp 2`: the degrees above 1, and always dp_shard."""
        shown = {name: getattr(self, name) for name in CONFIG_KEYS}
        return ", ".join(
            f"{name} {size}" for name, size in shown.items() if size > 1 or name == "dp_shard"
        )

    @cached_property
    def world_mesh(self) -> DeviceMesh:
        """The mesh of all ranks: pp, dp_replicate, dp_shard, cp, tp, outermost first.

        Dimensions of degree 1 are left out, except dp_shard. In addition, these names always exist:

        * `dp`: ranks that read different data;
        * `dp_shard_cp`: ranks that share parameters, gradients and optimizer state (FSDP);
        * `dp_cp`: ranks that have different tokens.

        Needs an initialised process group.
        """
        mesh = self._mesh("pp", "dp_replicate", "dp_shard", "cp", "tp", always="dp_shard")
        names = mesh.mesh_dim_names or ()
        for flat, dims in {
            "dp": ("dp_replicate", "dp_shard"),
            "dp_shard_cp": ("dp_shard", "cp"),
            "dp_cp": ("dp_replicate", "dp_shard", "cp"),
        }.items():
            mesh[tuple(dim for dim in dims if dim in names)]._flatten(flat)
        return mesh

    @cached_property
    def expert_mesh(self) -> DeviceMesh:
        """The same ranks, arranged for experts: pp, dp_replicate, expert_dp, ep, etp.

        `ep` ranks have different experts, `etp` ranks share each expert's matrices, `expert_dp`
        ranks hold the same experts and shard them (FSDP). Dimensions of degree 1 are left out,
        except expert_dp. Needs an initialised process group.
        """
        return self._mesh("pp", "dp_replicate", "expert_dp", "ep", "etp", always="expert_dp")

    def _mesh(self, *degrees: str, always: str) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        from torchtitan.runtime.device import device_type

        sizes = {name: getattr(self, name) for name in degrees}
        sizes = {name: size for name, size in sizes.items() if size > 1 or name == always}
        return init_device_mesh(device_type(), tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def groups(self) -> dict[str, ProcessGroup]:
        """Return name -> process group of this rank, for the parallelisms that are enabled.

        `fsdp` has the ranks that share parameters. Experts have their own groups for the ranks of
        `dp_replicate` and `pp`, named `expert_dp_replicate` and `expert_pp`.
        """
        groups = {}
        for name in ("pp", "dp_replicate", "cp", "tp"):
            if getattr(self, name) > 1:
                groups[name] = self.world_mesh[name].get_group()
        groups["fsdp"] = self.world_mesh["dp_shard_cp"].get_group()
        if self.ep_enabled or self.etp_enabled:
            names = self.expert_mesh.mesh_dim_names or ()
            for name in names:
                own = f"expert_{name}" if name in groups else name
                groups[own] = self.expert_mesh[name].get_group()
        return groups
