"""A copy of a job config without the settings of one machine, to check or plan it elsewhere."""

from __future__ import annotations

import copy

from .batch import resolve_batch
from .job_config import JobConfig
from .survival_rules import check_replica_groups


def without_machine(job_config: JobConfig, world_size: int) -> JobConfig:
    """A copy without what only the machines that train need to have: files, programs and CUDA.

    Of several replica groups (`fault_tolerance`) it is one, with its share of the batch.

    Raises:
        ConfigError: the replica groups cannot be, on any machine.
    """
    config = copy.deepcopy(job_config)
    checkpoint, groups = config.checkpoint, config.fault_tolerance
    # Without a path or a tokenizer's folder there are no weights to start from, on any machine.
    if checkpoint.initial_load_path or config.model.tokenizer_path != "bytes":
        checkpoint.initial_load_in_hf = False
    checkpoint.initial_load_path = ""
    if "://" in checkpoint.folder:
        checkpoint.folder = type(checkpoint)().folder
    config.model.tokenizer_path = "bytes"
    config.job.dump_folder = "."
    config.metrics.enable_wandb = False
    config.parallelism.enable_async_tensor_parallel = False
    if world_size == 1 and config.compile.enable:  # several ranks have no CUDA graphs anywhere
        config.compile.mode = "default"
    if groups.enable:
        check_replica_groups(config)
        if config.training.global_batch_size != -1:
            resolve_batch(config, groups.group_size)
            config.training.global_batch_size //= groups.group_size
        groups.enable = False
    return config
