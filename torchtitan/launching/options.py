"""The options of `torchtitan launch`, and the rules between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from torchtitan.config.options import flag, shown_as
from torchtitan.errors import ConfigError

_Repeated = tyro.conf.UseAppendAction[list[str]]


@dataclass
class Options:
    config: Annotated[tyro.conf.Positional[str], shown_as("CONFIG")]
    """TOML file of the job, as for `torchtitan train`. Its text is embedded in the output."""
    slurm: bool = False
    """Submit a batch script with sbatch."""
    kubernetes: bool = False
    """Submit manifests with kubectl."""
    skypilot: bool = False
    """Submit a task with sky launch or, with --spot, with sky jobs launch, which recovers it."""
    ssh: bool = False
    """Start the job on --hosts, which need passwordless ssh."""
    dry_run: bool = False
    """Print the output instead of submitting it."""
    out: Annotated[str | None, shown_as("FILE")] = None
    """Also write the output to a file."""

    nodes: Annotated[int, shown_as("N")] = 1
    """Number of hosts."""
    gpus_per_node: Annotated[int, shown_as("N")] = 8
    """GPUs per host; 0 for none."""
    processes_per_node: Annotated[int | None, shown_as("N")] = None
    """Ranks per host. Default: one per GPU."""
    name: Annotated[str | None, shown_as("NAME")] = None
    """Name of the job. Default: the name of the TOML file."""
    max_restarts: Annotated[int, shown_as("N")] = 3
    """How often to restart crashed ranks, from the newest checkpoint. Preempted jobs are restarted
    without limit."""
    grace: Annotated[int, shown_as("SECONDS")] = 180
    """How long before its end the job is signalled, so that it can save a checkpoint."""
    python: Annotated[str, shown_as("PATH")] = "python"
    """Python on the hosts that has torchtitan installed, as written in a shell."""
    workdir: Annotated[str | None, shown_as("FOLDER")] = None
    """Working directory on the hosts; the job's relative paths start there."""
    setup: Annotated[_Repeated, shown_as("COMMAND")] = field(default_factory=list)
    """Shell command that each host runs first, such as 'source .venv/bin/activate'."""
    env: Annotated[_Repeated, shown_as("NAME=VALUE")] = field(default_factory=list)
    """Environment variable of the ranks."""
    secret: Annotated[_Repeated, shown_as("NAME[=SECRET/KEY]")] = field(default_factory=list)
    """Environment variable that is never written down (HF_TOKEN): taken from your environment when
    the job is submitted, on Kubernetes from key KEY of secret SECRET (default: torchtitan/NAME)."""
    mount: Annotated[_Repeated, shown_as("SOURCE:/PATH")] = field(default_factory=list)
    """Mount SOURCE at /PATH on the hosts: a folder of the host; on Kubernetes also a claim (PVC);
    on SkyPilot a bucket (s3://...), which is copied to the hosts but not back: use it for data, and
    a URL for checkpoints (checkpoint.folder)."""
    image: Annotated[str | None, shown_as("IMAGE")] = None
    """Container image. Kubernetes requires one; Slurm needs the pyxis plugin for it."""
    port: Annotated[int, shown_as("N")] = 29500
    """Port of the ranks' rendezvous; on Slurm, it is derived from the job id instead."""

    time: Annotated[str | None, shown_as("D-HH:MM:SS")] = None
    """Slurm, Kubernetes: time limit of the job."""
    partition: Annotated[str | None, shown_as("NAME")] = None
    """Slurm: partition."""
    account: Annotated[str | None, shown_as("NAME")] = None
    """Slurm: account."""
    qos: Annotated[str | None, shown_as("NAME")] = None
    """Slurm: quality of service."""
    sbatch: Annotated[_Repeated, shown_as("OPTION")] = field(default_factory=list)
    """Slurm: any other option of sbatch, such as constraint=h100; it overrides those of the script.
    By default, the job gets whole hosts with all CPUs and memory; cpus-per-task=N shares them with
    other jobs."""
    kind: Annotated[
        Literal["job", "jobset", "pytorchjob"] | None, shown_as("{job,jobset,pytorchjob}")
    ] = None
    """Kubernetes: kind of resource: job (plain, the default), or jobset or pytorchjob, which need
    their operators."""
    namespace: Annotated[str | None, shown_as("NAME")] = None
    """Kubernetes: namespace."""
    node_selector: Annotated[_Repeated, shown_as("LABEL=VALUE")] = field(default_factory=list)
    """Kubernetes: label of the hosts to use."""
    gpu_type: Annotated[str | None, shown_as("NAME")] = None
    """SkyPilot: GPU model. Default: H100."""
    infra: Annotated[str | None, shown_as("CLOUD[/REGION]")] = None
    """SkyPilot: where to run. Default: the cheapest."""
    spot: bool = False
    """SkyPilot: use spot instances, which may be preempted."""
    hosts: Annotated[str | None, shown_as("HOST,HOST")] = None
    """ssh: the hosts; the others connect to the first."""
    head: Annotated[str | None, shown_as("ADDRESS")] = None
    """ssh: name or address under which the other hosts reach the first. Default: its name in
    --hosts."""
    ssh_command: Annotated[str | None, shown_as("COMMAND")] = None
    """ssh: command for which `COMMAND HOST bash -s` runs a shell on HOST. Default: ssh, set to
    never prompt, and to end two minutes after a host dies."""

    @property
    def processes(self) -> int:
        return self.gpus_per_node if self.processes_per_node is None else self.processes_per_node

    @property
    def backend(self) -> str:
        """The chosen one of `BACKENDS`."""
        return next(name for name in BACKENDS if getattr(self, name))


BACKENDS = ("slurm", "kubernetes", "skypilot", "ssh")

_ONLY = {
    "time": ("slurm", "kubernetes"),
    "partition": ("slurm",),
    "account": ("slurm",),
    "qos": ("slurm",),
    "sbatch": ("slurm",),
    "kind": ("kubernetes",),
    "namespace": ("kubernetes",),
    "node_selector": ("kubernetes",),
    "gpu_type": ("skypilot",),
    "infra": ("skypilot",),
    "spot": ("skypilot",),
    "hosts": ("ssh",),
    "head": ("ssh",),
    "ssh_command": ("ssh",),
    "image": ("slurm", "kubernetes", "skypilot"),
    "mount": ("slurm", "kubernetes", "skypilot"),
}
"""Option -> the backends that have it."""
_NAME = "[A-Za-z_][A-Za-z0-9_]*"
_FORMS = {
    "env": (rf"{_NAME}=[^\n]*", "NAME=VALUE, on one line"),
    "secret": (
        rf"{_NAME}(=[-.a-z0-9]+/[-._A-Za-z0-9]+)?",
        "NAME, or NAME=SECRET/KEY of Kubernetes",
    ),
    "mount": (r"[^\s,'\"]+:/(?!/)[^\s,:'\"]*", "SOURCE:/PATH"),
    "node_selector": (r"[-./\w]+=[-.\w]*", "LABEL=VALUE"),
}
"""Repeatable option -> a pattern of its values, and its description."""
_WORDS = ("partition", "account", "qos", "namespace", "gpu_type", "infra", "image")
"""Options whose value is one word."""
_OF_SBATCH = ("nodes", "ntasks-per-node", "signal", "requeue", "no-requeue", "job-name", "time")
"""Options of sbatch that the script or another option sets."""
_LEAST = {"nodes": 1, "gpus_per_node": 0, "max_restarts": 0, "grace": 1}
_SECRET = re.compile("TOKEN(?!IZER)|SECRET|PASSW(OR)?D|API_?KEY|ACCESS_KEY", re.IGNORECASE)


def check(options: Options) -> None:
    """Raise `ConfigError` for impossible values and combinations. Sets `nodes` from `hosts`."""
    _check_choice(options)
    _check_numbers(options)
    _check_texts(options)
    _check_paths(options)
    _check_backend(options)


def _check_choice(options: Options) -> None:
    """Require one backend, and no options of another."""
    chosen = [name for name in BACKENDS if getattr(options, name)]
    if len(chosen) != 1:
        given = " and ".join(f"--{name}" for name in chosen) or "none"
        raise ConfigError(
            f"give exactly one of {', '.join(f'--{name}' for name in BACKENDS)}, to choose where "
            f"the job runs (given: {given})"
        )
    for name, backends in _ONLY.items():
        if getattr(options, name) and chosen[0] not in backends:
            of = " and ".join(f"--{backend}" for backend in backends)
            raise ConfigError(f"{flag(name)}: an option of {of}, not of --{chosen[0]}")


def _check_numbers(options: Options) -> None:
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            raise ConfigError(f"{flag(name)} {getattr(options, name)}: must be at least {least}")
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port}: must be 1 to 65535")
    if options.processes < 1:
        given = options.processes_per_node
        raise ConfigError(
            f"--gpus-per-node {options.gpus_per_node}, --processes-per-node "
            f"{'not given' if given is None else given}: a host needs at least one process"
        )


def _check_texts(options: Options) -> None:
    for name in _WORDS:
        value = getattr(options, name)
        if value is not None and not re.fullmatch(r"[-+./:@#*\w]+", value):
            raise ConfigError(f"{flag(name)} {value!r}: must be one word")
    for name, (pattern, form) in _FORMS.items():
        for value in getattr(options, name):
            if not re.fullmatch(pattern, value):
                raise ConfigError(f"{flag(name)} {value}: must be {form}")
    for variable in options.env:
        name = variable.partition("=")[0]
        if _SECRET.search(name):
            raise ConfigError(
                f"--env {name}=...: the output would contain the secret. Use --secret {name}, "
                "which reads it from your environment or the cluster's secrets"
            )
    for secret in options.secret:
        if "=" in secret and not options.kubernetes:
            raise ConfigError(f"--secret {secret}: only Kubernetes supports SECRET/KEY; use NAME")
    for name, value in vars(options).items():
        if any("\n" in str(text) for text in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{flag(name)}: must be one line; --setup may be given several times")


def _check_paths(options: Options) -> None:
    if not options.python.strip():
        raise ConfigError("--python: is empty")
    if options.workdir and options.workdir.startswith("~"):
        raise ConfigError(
            f"--workdir {options.workdir}: `~` is not expanded on the hosts. Write the path out"
        )
    paths = [mount.rsplit(":/", 1)[1] for mount in options.mount]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ConfigError(f"--mount: two sources have the path /{twice}")


def option_key(option: str) -> str:
    """Return the key of an option: `constraint` of `--constraint=h100`."""
    return re.split("[= ]", option.lstrip("-"), maxsplit=1)[0]


def _check_backend(options: Options) -> None:
    if options.kubernetes and not options.image:
        raise ConfigError("--kubernetes needs --image: a container with torchtitan")
    if options.slurm and options.mount and not options.image:
        raise ConfigError("--mount: Slurm mounts into containers only; give --image too")
    for option in options.sbatch:
        key = option_key(option)
        if option[:1] == "-" != option[1:2]:
            raise ConfigError(f"--sbatch {option}: must be the long form, such as constraint=h100")
        if key in _OF_SBATCH:
            raise ConfigError(f"--sbatch {option}: {key} is set by another option of the command")
        if key == "array" and not option.endswith("%1"):
            raise ConfigError(
                f"--sbatch {option}: all tasks have the same job.dump_folder, so one at a time may "
                f"run: {option}%1. For runs side by side, launch each with its own"
            )
    if options.ssh:
        hosts = (options.hosts or "").split(",")
        if not options.hosts or not all(re.fullmatch(r"[-.@:\w]+", host) for host in hosts):
            raise ConfigError("--ssh needs --hosts HOST,HOST: names, separated by commas")
        if len(set(hosts)) != len(hosts):
            raise ConfigError(f"--hosts {options.hosts}: names a host twice")
        if options.nodes not in (1, len(hosts)):
            raise ConfigError(f"--nodes {options.nodes}: --hosts names {len(hosts)} hosts")
        options.nodes = len(hosts)
