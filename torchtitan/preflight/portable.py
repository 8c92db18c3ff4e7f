"""Copy a job config without machine-specific settings, to check or plan the job elsewhere."""

from __future__ import annotations

import copy

from torchtitan.config.batch import divide_batch
from torchtitan.config.job_config import JobConfig
from torchtitan.preflight.layout_rules import async_tensor_parallel_problems
from torchtitan.preflight.problems import refuse
from torchtitan.preflight.survival_rules import replica_group_problems
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.tools.text import is_url


def without_machine(job_config: JobConfig, world_size: int) -> JobConfig:
    """Return a copy without settings that need the training machines' files, programs or CUDA.

    With several replica groups (`fault_tolerance`), the copy is one group with its share of the
    batch.

    Raises:
        ConfigError: the replica groups or async tensor parallelism are impossible on any machine.
    """
    config = copy.deepcopy(job_config)
    checkpoint, groups = config.checkpoint, config.fault_tolerance
    # Keep the flag if neither a path nor a tokenizer folder is set: an error on any machine.
    if checkpoint.initial_load_path or config.model.tokenizer_path != "bytes":
        checkpoint.initial_load_in_hf = False
    if checkpoint.initial_load_path:  # else an error on any machine, too
        checkpoint.initial_load_model_only = True
    checkpoint.initial_load_path = ""
    if is_url(checkpoint.folder):
        checkpoint.folder = type(checkpoint)().folder
    config.model.tokenizer_path = "bytes"
    config.job.dump_folder = "."
    config.metrics.enable_wandb = config.metrics.enable_tensorboard = False
    if config.parallelism.enable_async_tensor_parallel:
        refuse(async_tensor_parallel_problems(config), config)
        train_spec_of(config).updated_args(config)  # a model may refuse it, too
        config.parallelism.enable_async_tensor_parallel = False
    if world_size == 1 and config.compile.enable:  # CUDA graphs with several ranks: always refused
        config.compile.mode = "default"
    if groups.enable:
        refuse(replica_group_problems(config), config)
        if config.training.global_batch_size != -1:
            divide_batch(config, groups.group_size)
        groups.enable, groups.semi_sync_method = False, "none"
    return config
