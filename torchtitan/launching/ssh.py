"""Renders a script that starts the job on all hosts, with ssh and without a scheduler."""

from __future__ import annotations

import shlex

from .job import LaunchJob, required_secrets
from .submit import require, run_on_file
from .template import fill

_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30 -o ServerAliveCountMax=4"
)
"""ssh never prompts, and ends after two minutes if a host dies silently."""


def render(job: LaunchJob) -> str:
    """Return the bash script."""
    options = job.options
    hosts = (options.hosts or "").split(",")
    head = options.head or hosts[0].rpartition("@")[2]
    # Secrets are passed through the pipe, neither in a file nor on a command line.
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
    """Run the script until the job ends."""
    require((job.options.ssh_command or "ssh").split()[0], "Install it")
    return run_on_file(["bash"], text, f"{job.name}.sh")
