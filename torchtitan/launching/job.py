"""Defines a job to launch: checked options, and the shell code that its hosts run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from torchtitan.errors import ConfigError

from .template import fill

if TYPE_CHECKING:
    from .options import Options

_HOSTS_WITHOUT_CARE = 100
"""Hosts up to which heartbeats may come every 5 s, which is torchrun's default."""


@dataclass
class LaunchJob:
    """All values that a scheduler's template may use."""

    options: Options
    name: str
    """A DNS label, as required by Kubernetes."""
    toml: str
    """Text of the job's file."""
    overrides: list[str]
    """Options of `torchtitan train`."""
    title: str
    command: str
    """The command that renders this job."""
    checkpoints: PurePosixPath | None = None
    """Their folder as seen by the ranks; None if none are saved, or behind a URL."""
    saves: bool = True
    """Whether it has checkpoints, so that a restart resumes it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Name -> value, for the ranks."""

    def node(
        self, *, shell_environment: bool = True, torchrun: str = "", join_timeout: int = 900
    ) -> str:
        """Return the shell function `node INDEX HEAD PORT` that each host runs.

        Args:
            shell_environment: set `environment` in it; otherwise the scheduler does.
            torchrun: options of `torchtitan.runtime.torchrun` that go first.
            join_timeout: seconds that hosts wait for each other.
        """
        options = self.options
        delimiter = "END_OF_JOB"
        while delimiter in self.toml:
            delimiter += "_"
        setup = [f"cd {shlex.quote(options.workdir)} || exit"] if options.workdir else []
        exports = [f"export {key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return fill(
            "node.sh",
            environment="\n".join(exports if shell_environment else []),
            setup="\n".join([*setup, *options.setup]),
            file=f"{self.name}.toml",
            toml=self.toml.rstrip("\n"),
            delimiter=delimiter,
            python=options.python,
            options=torchrun and f" {torchrun}",
            nodes=options.nodes,
            rdzv_conf=f"join_timeout={join_timeout}{_keep_alive(options.nodes)}",
            processes=options.processes,
            max_restarts=options.max_restarts,
            name=self.name,
            arguments="".join(f" {shlex.quote(word)}" for word in self.overrides),
        ).rstrip("\n")


def _keep_alive(hosts: int) -> str:
    """Return an option for the seconds between a host's heartbeats; it uses the variable `index`.

    A heartbeat replaces one state of all hosts, 146 kB for 1,250 of them, and of several in flight
    only one succeeds: 72 a second if they come one by one, almost none if all come at once. A host
    that misses 3 heartbeats, by the interval of another host, is considered dead.
    """
    if hosts <= _HOSTS_WITHOUT_CARE:
        return ""
    interval = hosts // 16
    return f",keep_alive_interval=$(({interval} + index % {interval // 3 + 1}))"


def job_name(options: Options) -> str:
    """Return `--name`, or the name of the file, as a DNS label.

    Raises:
        ConfigError: `--name` is not a DNS label.
    """
    if options.name is None:
        name = re.sub("[^a-z0-9]+", "-", Path(options.config).stem.lower()).strip("-")[:40]
        return name.strip("-") if name[:1].isalpha() else f"job-{name}".strip("-")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise ConfigError(
            f"--name {options.name}: must have at most 40 lowercase letters, digits and '-', and "
            "begin with a letter, because clusters use it for host names"
        )
    return options.name


def seconds_of(time: str) -> int:
    """Parse Slurm's `MINUTES`, `HOURS:MINUTES:SECONDS` or `DAYS-HOURS[:MINUTES[:SECONDS]]`.

    Returns the seconds.

    Raises:
        ConfigError: the text has none of these forms.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise ConfigError(
            f"--time {time}: must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, "
            "such as 2-00:00:00 for two days"
        )
    days, *rest = (int(part) if part else 0 for part in match.groups())
    given = [part for part in match.groups()[1:] if part is not None]
    if match[1] is not None or len(given) == 3:
        hours, minutes, seconds = rest
    else:
        hours, (minutes, seconds) = 0, rest[:2]
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ConfigError(f"--time {time}: must be above 0")
    return total


def required_secrets(job: LaunchJob) -> str:
    """Return shell lines that end a script whose environment lacks a secret."""
    return "\n".join(f': "${{{name}:?must be in the environment}}"' for name in job.options.secret)
