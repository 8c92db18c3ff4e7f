"""The rules that a model's sizes divide over the tensor and context parallel ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchtitan.config.load import origin
from torchtitan.errors import ConfigError
from torchtitan.models.common.moe import ALIGNMENT
from torchtitan.tools.multiples import divisors

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
    degrees = divisors(math.gcd(*sizes.values()))
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
    degrees = divisors(hidden_dim // ALIGNMENT)
    raise ConfigError(
        f"{origin(job_config, 'parallelism.expert_tensor_parallel_degree')}: cannot cut the "
        f"experts of {job_config.model.name} {job_config.model.flavor} (hidden_dim = {hidden_dim}) "
        f"into parts of a multiple of {ALIGNMENT}. "
        f"Degrees that do: {', '.join(map(str, degrees))}"
    )


def require_heads_divisible_by_cp(job_config: JobConfig, n_heads: int) -> None:
    """Check that Ulysses can give each rank as many of the query heads as the others.

    Key and value heads need not divide: they are repeated where there are too few.

    Raises:
        ConfigError: it cannot; names the key and the degrees that work.
    """
    parallelism = job_config.parallelism
    heads = n_heads // parallelism.tensor_parallel_degree
    degree = parallelism.context_parallel_degree
    if parallelism.context_parallel_method != "ulysses" or heads % degree == 0:
        return
    raise ConfigError(
        f"{origin(job_config, 'parallelism.context_parallel_degree')}: 'ulysses' shares the heads "
        f"of {job_config.model.name} {job_config.model.flavor}, and a rank has {heads} of them "
        f"(n_heads = {n_heads} / tensor_parallel_degree = {parallelism.tensor_parallel_degree}). "
        f"Degrees that divide these: {', '.join(map(str, divisors(heads)))}. "
        "The method 'allgather' takes any degree"
    )
