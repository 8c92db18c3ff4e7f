"""A job on a machine that will not train it: what is left out, and what is refused all the same."""

from __future__ import annotations

import pytest

from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError
from torchtitan.preflight.portable import without_machine
from torchtitan.preflight.validate import validate


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Of a cluster; this machine has none of it."""
    for name in ("RANK", "TORCHFT_LIGHTHOUSE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torchtitan.runtime.device.device_type", lambda: "cpu")
    config = JobConfig()
    config.model.tokenizer_path = "/only/on/the/cluster"
    config.job.dump_folder = "/proc/only/on/the/cluster"
    config.checkpoint.enable = True
    config.checkpoint.folder = "nothing://bucket/run"
    config.checkpoint.initial_load_path = "/only/on/the/cluster"
    config.checkpoint.initial_load_in_hf = True
    config.checkpoint.load_step = 100
    config.training.on_nonfinite = config.training.on_spike = "rollback"
    config.metrics.enable_wandb = True
    return config


def refusal(config: JobConfig, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(without_machine(config, world_size), world_size)
    return str(caught.value)


def test_what_the_machine_has_is_not_looked_for(config: JobConfig) -> None:
    before = repr(config)
    with pytest.raises(ConfigError):
        validate(config, 8)
    validate(without_machine(config, 8), 8)
    assert repr(config) == before


def test_a_rollback_still_needs_checkpoints(config: JobConfig) -> None:
    config.checkpoint.enable, config.checkpoint.load_step = False, -1
    assert "training.on_nonfinite" in refusal(config, 8)


def test_weights_to_start_from_still_need_a_folder(config: JobConfig) -> None:
    config.checkpoint.initial_load_path = ""
    validate(without_machine(config, 8), 8)
    config.model.tokenizer_path = "bytes"
    assert "needs a Hugging Face folder" in refusal(config, 8)


def test_the_checkpoint_to_branch_from_may_be_elsewhere_but_is_needed(config: JobConfig) -> None:
    config.checkpoint.initial_load_model_only = False
    validate(without_machine(config, 8), 8)
    config.checkpoint.initial_load_path = ""
    assert "no checkpoint to branch from" in refusal(config, 8)


def test_cuda_graphs_need_one_rank_but_no_gpu_here(config: JobConfig) -> None:
    config.compile.mode = "reduce-overhead"
    assert "set compile.enable" in refusal(config, 1)
    config.compile.enable = True
    validate(without_machine(config, 1), 1)
    assert "several ranks gather them to new addresses" in refusal(config, 2)


def test_a_replica_group_has_its_share_of_the_batch(config: JobConfig) -> None:
    config.training.on_nonfinite, config.training.on_spike = "skip", "skip"
    group = config.fault_tolerance
    group.enable, group.group_size, group.replica_id = True, 3, 2
    group.semi_sync_method = "diloco"
    config.training.local_batch_size, config.training.global_batch_size = 2, 48
    alone = without_machine(config, 8)
    validate(alone, 8)
    assert alone.training.global_batch_size == 16 and not alone.fault_tolerance.enable
    config.training.batch_size_ramp, config.training.global_batch_size = ["48:10"], 96
    alone = without_machine(config, 8)
    assert (alone.training.batch_size_ramp, alone.training.global_batch_size) == (["16:10"], 32)
    config.training.batch_size_ramp = []
    config.training.global_batch_size = 96 + 2
    assert "global_batch_size = 98" in refusal(config, 8)
    config.training.global_batch_size = 24
    assert "training.global_batch_size" in refusal(config, 8)
    config.training.global_batch_size = -1
    validate(without_machine(config, 8), 8)
    group.replica_id = 3
    assert "fault_tolerance.replica_id" in refusal(config, 8)
    group.replica_id, config.training.on_spike = 0, "rollback"
    assert "cannot roll back together" in refusal(config, 8)


def test_async_tensor_parallelism_needs_no_cuda_here_but_all_else(config: JobConfig) -> None:
    parallelism = config.parallelism
    parallelism.enable_async_tensor_parallel = config.compile.enable = True
    assert "needs parallelism.tensor_parallel_degree of 2 or more" in refusal(config, 8)
    parallelism.tensor_parallel_degree = 2
    validate(without_machine(config, 8), 8)
    config.compile.enable = False
    assert "needs the compiler" in refusal(config, 8)
    config.compile.enable, config.model.name = True, "flux"
    config.model.flavor = "debugmodel"
    assert "the sequence is not divided" in refusal(config, 8)
