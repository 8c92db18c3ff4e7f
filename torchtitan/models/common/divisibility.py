"""Check that a model's sizes are possible, and divide over tensor and context parallel ranks."""

from __future__ import annotations

import math

from torchtitan.config import JobConfig
from torchtitan.config.load import fail
from torchtitan.errors import ConfigError
from torchtitan.models.common.moe import ALIGNMENT
from torchtitan.tools.multiples import divisors


def require_sizes(job_config: JobConfig, rotated: int, **sizes: int) -> None:
    """Check that a model can have these `sizes` (name -> size).

    Args:
        rotated: features of a head that rotary positions turn.

    Raises:
        ConfigError: a size is below 1, or the rotated features are no pairs.
    """
    wrong = ", ".join(f"{name} = {size}" for name, size in sizes.items() if size < 1)
    if wrong:
        raise ConfigError(f"{job_config.model}: must be at least 1: {wrong}")
    if rotated % 2:
        raise ConfigError(
            f"{job_config.model}: rotary positions turn pairs of a head's features, but they are "
            f"{rotated}, an odd number"
        )


def require_divisible_by_tp(job_config: JobConfig, **sizes: int) -> None:
    """Check that tensor parallelism can cut every one of `sizes` (name -> size) in equal parts.

    Raises:
        ConfigError: it cannot; the message names the key, the sizes and the degrees that work.
    """
    degree = job_config.parallelism.tensor_parallel_degree
    if all(size % degree == 0 for size in sizes.values()):
        return
    degrees = divisors(math.gcd(*sizes.values()))
    written = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    fail(
        job_config,
        "parallelism.tensor_parallel_degree",
        f"does not divide the sizes of {job_config.model} ({written}). Degrees that do: "
        f"{', '.join(map(str, degrees))}",
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
    fail(
        job_config,
        "parallelism.expert_tensor_parallel_degree",
        f"cannot split the experts of {job_config.model} (hidden_dim = {hidden_dim}) into parts "
        f"whose size is a multiple of {ALIGNMENT}. Degrees that do: "
        f"{', '.join(map(str, degrees))}",
    )


def require_whole_experts(job_config: JobConfig, reason: str) -> None:
    """Check that expert tensor parallelism is off, for experts that cannot be split.

    Raises:
        ConfigError: it is on.
    """
    if job_config.parallelism.expert_tensor_parallel_degree > 1:
        fail(
            job_config,
            "parallelism.expert_tensor_parallel_degree",
            f"the experts of {job_config.model.name} cannot be split, because {reason}. Set it to "
            "1, and use parallelism.expert_parallel_degree",
        )


def require_heads_divisible_by_cp(job_config: JobConfig, n_heads: int) -> None:
    """Check that Ulysses can give each rank equally many query heads.

    Key and value heads need not divide: they are repeated if there are too few.

    Raises:
        ConfigError: it cannot; the message names the key and the degrees that work.
    """
    parallelism = job_config.parallelism
    heads = n_heads // parallelism.tensor_parallel_degree
    degree = parallelism.context_parallel_degree
    if parallelism.context_parallel_method != "ulysses" or heads % degree == 0:
        return
    fail(
        job_config,
        "parallelism.context_parallel_degree",
        f"'ulysses' splits the heads of {job_config.model}, but a rank has {heads} of them "
        f"(n_heads = {n_heads} / tensor_parallel_degree = "
        f"{parallelism.tensor_parallel_degree}). Degrees that divide this number: "
        f"{', '.join(map(str, divisors(heads)))}. The method 'allgather' works with any degree",
    )
