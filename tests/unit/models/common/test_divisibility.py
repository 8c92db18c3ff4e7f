import pytest

from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError
from torchtitan.models.common.divisibility import require_divisible_by_tp, require_sizes


def job(degree: int) -> JobConfig:
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = degree
    return config


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_common_divisors_pass(degree):
    require_divisible_by_tp(job(degree), n_heads=8, n_kv_heads=4)


@pytest.mark.parametrize("degree", [3, 8])
def test_other_degrees_are_refused_with_those_that_work(degree):
    with pytest.raises(ConfigError) as error:
        require_divisible_by_tp(job(degree), n_heads=8, n_kv_heads=4)
    message = str(error.value)
    assert f"parallelism.tensor_parallel_degree = {degree}" in message
    assert "n_kv_heads = 4" in message
    assert message.endswith("Degrees that do: 1, 2, 4")


def test_sizes_of_a_flavor_are_at_least_one():
    require_sizes(JobConfig(), 8, dim=1)
    with pytest.raises(ConfigError, match=r"must be at least 1: dim = 0, n_layers = -1$"):
        require_sizes(JobConfig(), 8, dim=0, n_layers=-1, n_heads=4)
