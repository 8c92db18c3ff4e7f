"""Whether a job can run on the hosts that are asked for, found out before it waits in a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan.errors import WorldSizeError

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


def check_job(job_config: JobConfig, nodes: int, processes: int) -> None:
    """Raise `ConfigError` as `torchtitan train` on `nodes` x `processes` ranks would.

    What only the cluster has (files, CUDA) is not looked for. Beyond the rules between options, the
    model is made and parallelised on the meta device, so its own rules are checked too.
    """
    from torchtitan.components.model_fit import check_builders
    from torchtitan.config.validate import validate
    from torchtitan.config.without_machine import without_machine
    from torchtitan.models.plugins import load_plugins
    from torchtitan.planning.trace import try_layout
    from torchtitan.protocols.train_spec import get_train_spec

    load_plugins(job_config.job.custom_import)
    spec = get_train_spec(job_config.model.name, job_config.model.flavor)
    world_size = nodes * processes
    config = without_machine(job_config, world_size)
    try:
        validate(config, world_size)
    except WorldSizeError as error:
        told = f"--nodes {nodes} x {processes} processes; --processes-per-node N sets them"
        raise WorldSizeError(f"{error} ({told})") from error
    check_builders(spec, config)
    try_layout(config, world_size)
