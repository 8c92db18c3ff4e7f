"""The rule that a model's sizes divide over the tensor-parallel ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchtitan.config.load import origin
from torchtitan.errors import ConfigError
from torchtitan.models.common.moe import ALIGNMENT

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


def require_divisible_by_tp(job_config: JobConfig, **sizes: int) -> None:
    """Check that tensor parallelism can cut every one of `sizes` (name -> size) in equal parts.

    Raises:
        ConfigError: it cannot; names the key, the sizes and the degrees that work.
    """
    degree = job_config.parallelism.tensor_parallel_degree
    if all(size % degree == 0 for size in sizes.values()):
        return
    common = math.gcd(*sizes.values())
    degrees = [d for d in range(1, common + 1) if common % d == 0]
    written = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    raise ConfigError(
        f"{origin(job_config, 'parallelism.tensor_parallel_degree')}: does not divide the sizes of "
        f"{job_config.model.name} {job_config.model.flavor} ({written}). "
        f"Degrees that do: {', '.join(map(str, degrees))}"
    )


def require_splittable_experts(job_config: JobConfig, hidden_dim: int) -> None:
    """Check that expert tensor parallelism can cut experts of `hidden_dim` features.

    Raises:
        ConfigError: the parts would be uneven, or not be multiples of 8 as `grouped_mm` needs.
    """
    degree = job_config.parallelism.expert_tensor_parallel_degree
    if hidden_dim % (degree * ALIGNMENT) == 0:
        return
    parts = hidden_dim // ALIGNMENT
    degrees = [d for d in range(1, parts + 1) if parts % d == 0]
    raise ConfigError(
        f"{origin(job_config, 'parallelism.expert_tensor_parallel_degree')}: cannot cut the "
        f"experts of {job_config.model.name} {job_config.model.flavor} (hidden_dim = {hidden_dim}) "
        f"into parts of a multiple of {ALIGNMENT}. "
        f"Degrees that do: {', '.join(map(str, degrees))}"
    )
