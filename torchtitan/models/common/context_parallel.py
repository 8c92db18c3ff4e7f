"""The rule that a model's heads divide over the context-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan.config.load import origin
from torchtitan.errors import ConfigError

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


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
    degrees = [d for d in range(1, heads + 1) if heads % d == 0]
    raise ConfigError(
        f"{origin(job_config, 'parallelism.context_parallel_degree')}: 'ulysses' shares the heads "
        f"of {job_config.model.name} {job_config.model.flavor}, and a rank has {heads} of them "
        f"(n_heads = {n_heads} / tensor_parallel_degree = {parallelism.tensor_parallel_degree}). "
        f"Degrees that divide these: {', '.join(map(str, degrees))}. "
        "The method 'allgather' takes any degree"
    )
