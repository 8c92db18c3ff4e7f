import pytest
from tiny_models import TINY

from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError
from torchtitan.models.llama3 import Llama3ModelArgs

ARGS = TINY["llama3"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "problem"),
    [(5, 5, r"n_heads \(5\) must divide dim"), (8, 3, r"n_kv_heads \(3\) must divide n_heads")],
)
def test_heads_that_do_not_divide_are_refused(heads, kv_heads, problem):
    with pytest.raises(ValueError, match=problem):
        Llama3ModelArgs(dim=32, n_heads=heads, n_kv_heads=kv_heads)


def test_a_ulysses_degree_that_splits_a_head_is_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.context_parallel_degree = 4
    ARGS.update_from_config(config)
    config.parallelism.context_parallel_method = "ulysses"
    with pytest.raises(ConfigError, match=r"a rank has 2 of them .*Degrees .*: 1, 2\. The"):
        ARGS.update_from_config(config)
    config.parallelism.context_parallel_degree = 2  # its one key and value head is repeated
    ARGS.update_from_config(config)
