"""Renders a task for SkyPilot."""

from __future__ import annotations

from typing import Any

from .job import LaunchJob
from .storage import split_mount
from .submit import require, run_on_file
from .template import fill, quoted


def render(job: LaunchJob) -> str:
    """Return the YAML file for `sky launch`."""
    options = job.options
    resources: dict[str, Any] = {}
    if options.gpus_per_node:
        resources["accelerators"] = f"{options.gpu_type or 'H100'}:{options.gpus_per_node}"
    if options.infra:
        resources["infra"] = options.infra
    if options.spot:
        resources["use_spot"] = True
    if options.image:
        resources["image_id"] = f"docker:{options.image.removeprefix('docker:')}"
    mounts = {path: source for source, path in map(split_mount, options.mount)}
    return fill(
        "skypilot.yaml",
        title=job.title,
        command=job.command,
        name=job.name,
        nodes=options.nodes,
        resources=mapping(resources),
        max_restarts=options.max_restarts,
        environment=section("envs", job.environment),
        secrets=section("secrets", dict.fromkeys(options.secret)),
        file_mounts=section("file_mounts", mounts),
        node=job.node(shell_environment=False),
        port=options.port,
    )


def submit(job: LaunchJob, text: str) -> int:
    require("sky", "pip install skypilot")
    words = ["sky", "launch", "--cluster", job.name]
    if job.options.spot:
        words = ["sky", "jobs", "launch", "--name", job.name]
    for name in job.options.secret:
        words += ["--secret", name]
    return run_on_file([*words, "--yes"], text, f"{job.name}.yaml")


def mapping(values: dict[str, Any]) -> str:
    """Format lines of YAML, `name: value`."""
    return "\n".join(f"{name}: {quoted(value)}" for name, value in values.items())


def section(name: str, values: dict[str, Any]) -> str:
    """Format `name:` and its values; nothing if there are none."""
    if not values:
        return ""
    return f"{name}:\n" + "\n".join(f"  {line}" for line in mapping(values).splitlines())
