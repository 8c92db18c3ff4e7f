"""The degrees of parallelism and the device mesh they span."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torchtitan.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from torchtitan.config.parallelism import Parallelism


@dataclass
class ParallelDims:
    """Degrees of parallelism whose product is the world size.

    `dp_shard = -1` takes the ranks that the other degrees leave.

    Raises:
        ConfigError: the degrees do not fit the world.
    """

    dp_replicate: int
    dp_shard: int
    tp: int
    world_size: int

    def __post_init__(self) -> None:
        others = self.dp_replicate * self.tp
        replicate = f"data_parallel_replicate_degree ({self.dp_replicate})"
        written = f"{replicate} x tensor_parallel_degree ({self.tp})"
        if self.dp_shard == -1:
            if self.world_size % others:
                divisors = [d for d in range(1, self.world_size + 1) if self.world_size % d == 0]
                raise ConfigError(
                    f"parallelism: {written} = {others} does not divide the world size "
                    f"{self.world_size}. The product must be one of {divisors}"
                )
            self.dp_shard = self.world_size // others
        if others * self.dp_shard != self.world_size:
            raise ConfigError(
                f"parallelism: {written} x data_parallel_shard_degree ({self.dp_shard}) = "
                f"{others * self.dp_shard}, but the world size (number of processes) is "
                f"{self.world_size}. Start {others * self.dp_shard} processes, or set "
                f"data_parallel_shard_degree = -1 to use the ranks that are left"
            )

    @classmethod
    def from_config(cls, parallelism: Parallelism, world_size: int) -> ParallelDims:
        return cls(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=parallelism.data_parallel_shard_degree,
            tp=parallelism.tensor_parallel_degree,
            world_size=world_size,
        )

    @property
    def dp(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_enabled(self) -> bool:
        return self.dp > 1

    @property
    def dp_replicate_enabled(self) -> bool:
        return self.dp_replicate > 1

    @property
    def dp_shard_enabled(self) -> bool:
        return self.dp_shard > 1

    @property
    def tp_enabled(self) -> bool:
        return self.tp > 1

    @property
    def non_data_parallel_size(self) -> int:
        """Ranks that work on the same data."""
        return self.world_size // self.dp

    @cached_property
    def world_mesh(self) -> DeviceMesh:
        """The mesh of all ranks: dp_replicate, dp_shard, tp (outermost first) and the flat `dp`.

        Dimensions of degree 1 are left out, but for dp_shard, so that `world_mesh["dp"]` exists
        on every layout. Needs an initialised process group.
        """
        from torch.distributed.device_mesh import init_device_mesh

        from torchtitan.distributed.utils import device_type

        dims = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "tp": self.tp}
        dims = {name: size for name, size in dims.items() if size > 1 or name == "dp_shard"}
        assert math.prod(dims.values()) == self.world_size
        mesh = init_device_mesh(device_type(), tuple(dims.values()), mesh_dim_names=tuple(dims))
        data_dims = tuple(name for name in dims if name.startswith("dp_"))
        mesh[data_dims]._flatten("dp")
        return mesh
