import dataclasses

import pytest
from tiny_models import TINY

from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError

ARGS = TINY["deepseek_v3"]


def test_more_dense_layers_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"n_dense_layers \(4\) must be at most n_layers \(3\)"):
        dataclasses.replace(ARGS, n_dense_layers=4)


def test_a_ring_is_refused_where_keys_and_values_differ_in_size():
    config = JobConfig()
    config.parallelism.context_parallel_method = "ring"
    ARGS.update_from_config(config)
    config.parallelism.context_parallel_degree = 2
    dataclasses.replace(ARGS, v_dim=40).update_from_config(config)
    with pytest.raises(ConfigError, match=r"keys of 40 features and values of 24\. Use 'allgather"):
        ARGS.update_from_config(config)
