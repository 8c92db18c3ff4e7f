"""Renders a batch script for Slurm."""

from __future__ import annotations

import os
import shlex
from pathlib import PurePosixPath

from torchtitan.errors import ConfigError

from .job import LaunchJob, required_secrets, seconds_of
from .options import option_key
from .storage import mount_with
from .submit import require, run
from .template import fill

_OF_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables that tell sbatch where to submit."""
_EARLY = 60
"""Seconds by which Slurm may send the signal before its time."""


def render(job: LaunchJob) -> str:
    """Return the script for sbatch."""
    options = job.options
    directives = {"time": options.time, "partition": options.partition}
    directives |= {"account": options.account, "qos": options.qos}
    if options.time and seconds_of(options.time) <= options.grace + _EARLY:
        raise ConfigError(
            f"--time {options.time}: must be longer than --grace {options.grace} and {_EARLY} s, "
            "or Slurm may signal the job to stop as soon as it starts, each time"
        )
    lines = [f"{name}={value}" for name, value in directives.items() if value]
    if options.gpus_per_node:
        lines.insert(0, f"gpus-per-node={options.gpus_per_node}")
    lines = [*_whole_hosts(options.sbatch), *lines]
    lines += [option.lstrip("-") for option in options.sbatch]  # of two, the last one counts
    srun = []
    if options.image:
        srun.append(f"--container-image={options.image}")
    if options.mount:
        srun.append(f"--container-mounts={','.join(options.mount)}")
    return fill(
        "slurm.sbatch",
        title=job.title,
        command=job.command,
        name=job.name,
        nodes=options.nodes,
        directives="\n".join(f"#SBATCH --{line}" for line in lines),
        grace=options.grace,
        secrets=required_secrets(job),
        # A job without checkpoints would reach its time limit again and again.
        preempted='again="stopped by a signal"' if job.saves else ":",
        checkpoints=shlex.quote(_checkpoints(job)),
        node=job.node(),
        srun="".join(f" {shlex.quote(option)}" for option in srun),
    )


def _whole_hosts(sbatch: list[str]) -> list[str]:
    """Request all CPUs and all memory of each host, unless the user sets the job's share.

    Slurm's own default may be a single CPU, for all ranks of a host and their data loading.
    """
    keys = {option_key(option) for option in sbatch}
    if keys & {"cpus-per-task", "cpus-per-gpu", "oversubscribe"}:
        return []
    if keys & {"mem", "mem-per-cpu", "mem-per-gpu"}:  # Slurm accepts only one of these
        return ["exclusive"]
    return ["exclusive", "mem=0"]


def _checkpoints(job: LaunchJob) -> str:
    """Return the checkpoints' folder as seen by the batch script; a nonexistent one if unseen.

    The script runs outside of the container, and cannot access storage behind URLs.
    """
    folder = job.checkpoints
    if folder is not None and not job.options.image:
        return str(folder)
    if folder is not None and (mount := mount_with(folder, job)):
        source, path = mount
        return str(PurePosixPath(source, folder.relative_to(path)))
    return "/nonexistent"


def submit(job: LaunchJob, text: str) -> int:
    require("sbatch", "Run this on the cluster's login node")
    return run(["sbatch"], text, _without_another_job(dict(os.environ)))


def _without_another_job(environment: dict[str, str]) -> dict[str, str]:
    """Leave out the variables of the interactive job in which this process runs, if any.

    sbatch passes them on. srun then fails, if the two jobs ask for memory in different ways, or has
    as many CPUs as the interactive job.
    """
    if "SLURM_JOB_ID" not in environment:
        return environment
    return {k: v for k, v in environment.items() if not k.startswith("SLURM_") or k in _OF_CLUSTER}
