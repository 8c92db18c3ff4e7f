"""Renders a batch script for Slurm."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from .job import LaunchJob, required_secrets, seconds_of
from .options import option_key
from .storage import checkpoint_folder, mount_with
from .submit import require, run
from .template import fill


def render(job: LaunchJob) -> str:
    """Return the script for sbatch."""
    options = job.options
    directives = {"time": options.time, "partition": options.partition}
    directives |= {"account": options.account, "qos": options.qos}
    if options.time:
        seconds_of(options.time)
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
        preempted='again="preempted, the checkpoint is saved"' if job.saves else ":",
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
    unseen = "/nonexistent"
    folder = checkpoint_folder(job)
    if folder is None:
        return unseen
    if not job.options.image:
        return str(folder)
    mount = mount_with(folder, job)
    if mount is None:
        return unseen
    source, path = mount
    return str(PurePosixPath(source, folder.relative_to(path)))


def submit(job: LaunchJob, text: str) -> int:
    require("sbatch", "Run this on the cluster's login node")
    return run(["sbatch"], text)
