"""Hosts with ssh and no scheduler: a script that starts the job on all of them."""

from __future__ import annotations

import shlex

from .job import LaunchJob, required_secrets
from .submit import require, run_on_file
from .template import fill

_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30 -o ServerAliveCountMax=4"
)
"""ssh never asks, and ends after two minutes where a host dies without a word."""


def render(job: LaunchJob) -> str:
    """The bash script."""
    options = job.options
    hosts = (options.hosts or "").split(",")
    head = options.head or hosts[0].rpartition("@")[2]
    # Secrets go through the pipe, neither into a file nor into a command line.
    secrets = [f"printf 'export {name}=%q\\n' \"${name}\"" for name in options.secret]
    return fill(
        "ssh.sh",
        title=job.title,
        command=job.command,
        name=job.name,
        hosts=shlex.join(hosts),
        required=required_secrets(job),
        ssh=options.ssh_command or "ssh " + _OPTIONS,
        node=job.node(),
        secrets="\n".join(secrets),
        head=shlex.quote(head),
        port=options.port,
    )


def submit(job: LaunchJob, text: str) -> int:
    """Run the script, to the end of the job."""
    require((job.options.ssh_command or "ssh").split()[0], "Install it")
    return run_on_file(["bash"], text, f"{job.name}.sh")
