"""Determines where a job's checkpoints go, and whether they outlive its hosts."""

from __future__ import annotations

from pathlib import PurePosixPath

from torchtitan.errors import ConfigError
from torchtitan.tools.text import is_url

from .job import LaunchJob


def split_mount(mount: str) -> tuple[str, str]:
    """Split SOURCE and /PATH."""
    source, path = mount.rsplit(":/", 1)
    return source, f"/{path}"


def mount_with(folder: PurePosixPath, job: LaunchJob) -> tuple[str, str] | None:
    """Return SOURCE and /PATH of the `--mount` that contains a folder; None if there is none."""
    mounts = map(split_mount, job.options.mount)
    return next(((source, path) for source, path in mounts if folder.is_relative_to(path)), None)


def check_saving(job: LaunchJob) -> str:
    """Return a warning if the job has no checkpoints, else ""."""
    if job.saves:
        return ""
    return (
        "checkpoint.enable is false: a job that crashes or loses a host restarts at step 0, and a "
        "job that is asked to stop (time limit, preemption) ends with exit code 2"
    )


def check_storage(job: LaunchJob) -> str:
    """Return a warning if checkpoints are lost with a pod or a host, else "".

    Raises:
        ConfigError: they would go into a mount of SkyPilot, which is a copy.
    """
    folder, options = job.checkpoints, job.options
    in_container = options.slurm and options.image
    if folder is None or not (options.kubernetes or options.skypilot or in_container):
        return ""
    mount = mount_with(folder, job)
    if mount and options.skypilot:
        source, path = mount
        bucket = source if is_url(source) else "s3://BUCKET"
        raise ConfigError(
            f"--mount {source}:{path}: checkpoints would be saved under it, in {folder}, and "
            "never reach the bucket, because SkyPilot copies to the hosts but not back. Save them "
            f"to a URL: -- --checkpoint.folder {bucket.rstrip('/')}/{job.name}"
        )
    if mount:
        return ""
    if in_container:
        return (
            f"checkpoints go to {folder} in each container, and are lost with it unless the "
            "cluster mounts that folder: give --mount /FOLDER:/PATH and -- --job.dump_folder "
            "/PATH/..., or a URL in checkpoint.folder"
        )
    if options.kubernetes:
        return (
            f"checkpoints go to {folder} in each pod, and are lost with it: give --mount "
            "CLAIM:/PATH and -- --job.dump_folder /PATH/..., or a URL in checkpoint.folder"
        )
    if options.spot or options.nodes > 1:
        return (
            f"checkpoints go to {folder} on the disk of each host, and are lost with it: give a "
            f"URL, -- --checkpoint.folder s3://BUCKET/{job.name}"
        )
    return ""
