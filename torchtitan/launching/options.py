"""The options of `torchtitan launch`, and the rules between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from torchtitan.errors import ConfigError
from torchtitan.tools.options import flag, shown_as

_Repeated = tyro.conf.UseAppendAction[list[str]]


@dataclass
class Options:
    config: Annotated[tyro.conf.Positional[str], shown_as("CONFIG")]
    """TOML file of the job, as for `torchtitan train`. Its text goes into what is rendered."""
    slurm: bool = False
    """A batch script, for sbatch."""
    kubernetes: bool = False
    """Manifests, for kubectl apply."""
    skypilot: bool = False
    """A task, for sky launch; with --spot for sky jobs launch, which recovers it."""
    ssh: bool = False
    """A script that starts the job on --hosts, which have passwordless ssh."""
    dry_run: bool = False
    """Print what would be submitted, and do not submit it."""
    out: Annotated[str | None, shown_as("FILE")] = None
    """Write it to a file too."""

    nodes: Annotated[int, shown_as("N")] = 1
    """Hosts."""
    gpus_per_node: Annotated[int, shown_as("N")] = 8
    """GPUs of a host; 0 for none."""
    processes_per_node: Annotated[int | None, shown_as("N")] = None
    """Ranks on a host. Default: one for each GPU."""
    name: Annotated[str | None, shown_as("NAME")] = None
    """Name of the job. Default: that of the file."""
    max_restarts: Annotated[int, shown_as("N")] = 3
    """How often ranks that crash are started again, from the newest checkpoint. Preempted jobs are
    started again as often as it takes."""
    grace: Annotated[int, shown_as("SECONDS")] = 180
    """How long before its end the job is told, to save a checkpoint."""
    python: Annotated[str, shown_as("PATH")] = "python"
    """Python of the hosts, in which torchtitan is installed."""
    workdir: Annotated[str | None, shown_as("FOLDER")] = None
    """Folder of the hosts to run in; relative paths of the job start there."""
    setup: Annotated[_Repeated, shown_as("COMMAND")] = field(default_factory=list)
    """Shell command for each host to run first, such as 'source .venv/bin/activate'."""
    env: Annotated[_Repeated, shown_as("NAME=VALUE")] = field(default_factory=list)
    """Environment variable of the ranks."""
    secret: Annotated[_Repeated, shown_as("NAME[=SECRET/KEY]")] = field(default_factory=list)
    """Environment variable that is never written down (HF_TOKEN): taken from your environment when
    the job is submitted, on Kubernetes from key KEY of secret SECRET (default: torchtitan/NAME)."""
    mount: Annotated[_Repeated, shown_as("SOURCE:/PATH")] = field(default_factory=list)
    """What the hosts see at /PATH: a folder of the host, for Kubernetes a claim (PVC) too, for
    SkyPilot a bucket (s3://...), which is copied to the hosts and not back: it is for data, and
    checkpoints go to a URL (checkpoint.folder)."""
    image: Annotated[str | None, shown_as("IMAGE")] = None
    """Container; Kubernetes needs one, Slurm needs the plugin pyxis for it."""
    port: Annotated[int, shown_as("N")] = 29500
    """On which ranks meet; Slurm's follows from the job's number."""

    time: Annotated[str | None, shown_as("D-HH:MM:SS")] = None
    """Slurm, Kubernetes: limit of the job."""
    partition: Annotated[str | None, shown_as("NAME")] = None
    """Slurm."""
    account: Annotated[str | None, shown_as("NAME")] = None
    """Slurm."""
    qos: Annotated[str | None, shown_as("NAME")] = None
    """Slurm."""
    sbatch: Annotated[_Repeated, shown_as("OPTION")] = field(default_factory=list)
    """Slurm: any other option of sbatch, such as constraint=h100. It goes before what the script
    asks for itself. cpus-per-task=N shares hosts with other jobs, which otherwise belong to the
    job, with all CPUs and memory."""
    kind: Literal["job", "jobset", "pytorchjob"] | None = None
    """Kubernetes: job (plain, the default), jobset or pytorchjob, which need their operators."""
    namespace: Annotated[str | None, shown_as("NAME")] = None
    """Kubernetes."""
    node_selector: Annotated[_Repeated, shown_as("LABEL=VALUE")] = field(default_factory=list)
    """Kubernetes: label of the hosts to use."""
    gpu_type: Annotated[str | None, shown_as("NAME")] = None
    """SkyPilot: H100, ... Default: H100."""
    infra: Annotated[str | None, shown_as("CLOUD[/REGION]")] = None
    """SkyPilot: where. Default: the cheapest."""
    spot: bool = False
    """SkyPilot: use machines that may be taken away."""
    hosts: Annotated[str | None, shown_as("HOST,HOST")] = None
    """ssh: the hosts, the first of which the others connect to."""
    head: Annotated[str | None, shown_as("ADDRESS")] = None
    """ssh: name or address of the first host for the others. Default: its name in --hosts."""
    ssh_command: Annotated[str | None, shown_as("COMMAND")] = None
    """ssh: COMMAND HOST bash -s must run a shell there. Default: ssh, which asks nothing, and
    ends after two minutes where a host has died."""

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
_LEAST = {"nodes": 1, "gpus_per_node": 0, "max_restarts": 0, "grace": 1}
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "ACCESS_KEY")


def check(options: Options) -> None:
    """Raise `ConfigError` for impossible values and combinations."""
    _check_choice(options)
    _check_numbers(options)
    _check_texts(options)
    _check_backend(options)


def _check_choice(options: Options) -> None:
    """Require one backend, and no options of another."""
    chosen = [name for name in BACKENDS if getattr(options, name)]
    if len(chosen) != 1:
        given = " and ".join(f"--{name}" for name in chosen) or "none"
        raise ConfigError(
            f"give one of {', '.join(f'--{name}' for name in BACKENDS)}, to say where the job goes "
            f"(given: {given})"
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
        raise ConfigError(
            f"--gpus-per-node {options.gpus_per_node}, --processes-per-node "
            f"{options.processes_per_node or 'not given'}: a host needs at least one process"
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
        if any(word in name.upper() for word in _SECRET_WORDS):
            raise ConfigError(
                f"--env {name}=...: what is rendered would show it. Use --secret {name}, which "
                "takes it from where it is kept"
            )
    for secret in options.secret:
        if "=" in secret and not options.kubernetes:
            raise ConfigError(f"--secret {secret}: only Kubernetes has SECRET/KEY; use NAME")
    for name, value in vars(options).items():
        if any("\n" in str(text) for text in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{flag(name)}: must be one line; --setup may be given several times")


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
        if key in ("nodes", "ntasks-per-node", "signal", "requeue", "no-requeue", "job-name"):
            raise ConfigError(f"--sbatch {option}: {key} is set by other options of the command")
    if options.ssh:
        hosts = (options.hosts or "").split(",")
        if not options.hosts or not all(re.fullmatch(r"[-.@:\w]+", host) for host in hosts):
            raise ConfigError("--ssh needs --hosts HOST,HOST: names, with commas between them")
        if len(set(hosts)) != len(hosts):
            raise ConfigError(f"--hosts {options.hosts}: a host is named twice")
        if options.nodes not in (1, len(hosts)):
            raise ConfigError(f"--nodes {options.nodes}: --hosts names {len(hosts)}")
        options.nodes = len(hosts)
