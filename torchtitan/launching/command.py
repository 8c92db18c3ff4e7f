"""`torchtitan launch`: the command line."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from pathlib import PurePosixPath

from torchtitan.config import JobConfig, load_config
from torchtitan.config.options import parse_options, split_overrides
from torchtitan.config.toml_file import TomlFile
from torchtitan.errors import ConfigError, WorldSizeError
from torchtitan.tools.result_file import require_folder, write_result
from torchtitan.tools.text import is_url

from . import kubernetes, skypilot, slurm, ssh
from .job import LaunchJob, job_name
from .options import Options, check
from .storage import check_saving, check_storage
from .template import require_plain

DESCRIPTION = """\
Start a job on a cluster, or show what it would submit. CONFIG is a file for `torchtitan train`;
the job is checked first, as if it ran. See docs/launching.md.

  torchtitan launch --slurm llama3_8b.toml --nodes 4 --partition gpu --dry-run
  torchtitan launch --kubernetes llama3_8b.toml --nodes 4 \\
      --image me/titan:1 --mount claim:/out -- --job.dump_folder /out
  torchtitan launch --skypilot llama3_8b.toml --nodes 2 --spot \\
      -- --checkpoint.folder s3://my-bucket/llama3_8b
  torchtitan launch --ssh llama3_8b.toml --hosts node1,node2

Options after -- change the job's config, as for `torchtitan train`.

Exit code: that of the submitting tool; 2 for a mistake in the command or the config."""

BACKENDS = {"slurm": slurm, "kubernetes": kubernetes, "skypilot": skypilot, "ssh": ssh}
"""Each has `render(job)` and `submit(job, text)`."""

_LONGEST = 120_000
"""Linux allows 128 KiB for an argument, which has the rest of the host's script, too."""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan launch`; return the exit code."""
    own, overrides = split_overrides(argv)
    options = parse_options(Options, own, "torchtitan launch", DESCRIPTION)
    check(options)
    require_folder(options.out, "--out")
    job = _job(options, overrides, argv)
    for warning in filter(None, (check_saving(job), check_storage(job))):
        sys.stderr.write(f"warning: {warning}\n")
    backend = BACKENDS[options.backend]
    text = backend.render(job)
    if options.out:
        write_result(options.out, text, "--out")
    if options.dry_run:
        sys.stdout.write(text)
        return 0
    _check_secrets(options)
    return backend.submit(job, text)


def _check_secrets(options: Options) -> None:
    """Require the secrets now: the job itself would miss them only after its time in the queue."""
    for name in options.secret:
        if not options.kubernetes and not os.environ.get(name):
            raise ConfigError(
                f"--secret {name}: is not in your environment, from which the job takes it"
            )


def _job(options: Options, overrides: list[str], argv: list[str]) -> LaunchJob:
    name = job_name(options)
    config = load_config([f"--job.config_file={options.config}", *overrides])
    warnings.simplefilter("ignore")  # PyTorch warns about the meshes of a fake world
    logging.getLogger("torchtitan").setLevel(logging.WARNING)
    check_job(config, options.nodes, options.processes)
    environment = {"NCCL_DEBUG": "WARN", "PYTHONUNBUFFERED": "1"}
    environment |= dict(variable.split("=", 1) for variable in options.env)
    text = TomlFile.read(options.config).text
    size = len(text.encode())
    if size > _LONGEST and (options.slurm or options.kubernetes):
        raise ConfigError(
            f"{options.config}: has {size:,} bytes; must be at most {_LONGEST:,}, because the "
            "hosts get it on a command line"
        )
    for number, line in enumerate(text.split("\n"), 1):
        require_plain(line, f"{options.config}:{number}")
    for word in argv:
        require_plain(word, f"argument {word!r}")
    return LaunchJob(
        options=options,
        name=name,
        toml=text,
        overrides=overrides,
        title=f"{config.model} on {options.nodes} x {options.processes}",
        command="Rendered by: " + _rendering(argv),
        checkpoints=_checkpoints(config, options),
        saves=config.checkpoint.enable or config.fault_tolerance.enable,
        environment=environment,
    )


def check_job(job_config: JobConfig, nodes: int, processes: int) -> None:
    """Raise `ConfigError` as `torchtitan train` on `nodes` x `processes` ranks would.

    Things that only the cluster has (files, CUDA) are not checked. Beyond the rules between
    options, the model is built and parallelised on the meta device, so its own rules are checked
    too.
    """
    from torchtitan.models.plugins import load_plugins
    from torchtitan.planning.trace import try_layout
    from torchtitan.preflight.model_fit import valid_spec
    from torchtitan.preflight.portable import without_machine

    load_plugins(job_config.job.custom_import)
    world_size = nodes * processes
    config = without_machine(job_config, world_size)
    try:
        valid_spec(config, world_size)
    except WorldSizeError as error:
        told = f"--nodes {nodes} x {processes} processes; set them with --processes-per-node N"
        raise WorldSizeError(f"{error} ({told})") from error
    try_layout(config, world_size)


def _checkpoints(config: JobConfig, options: Options) -> PurePosixPath | None:
    # These import torch, which help and wrong options do not need.
    from torchtitan.components.checkpoint.folder import checkpoint_root
    from torchtitan.components.fault_tolerance import with_own_folder

    if not config.checkpoint.enable or is_url(config.checkpoint.folder):
        return None
    return PurePosixPath(options.workdir or "", str(checkpoint_root(with_own_folder(config))))


def _rendering(argv: list[str]) -> str:
    """Return the command that shows what `argv` submits."""
    own, _ = split_overrides(argv)
    words = [word for word in own if word != "--dry-run"]
    words = ["torchtitan", "launch", *words, "--dry-run", *argv[len(own) :]]
    return " ".join(map(_on_one_line, words))


def _on_one_line(word: str) -> str:
    """Quote a word for Bash on one line, since in a comment a second line would be no comment."""
    if "\n" not in word:
        return shlex.quote(word)
    escaped = json.dumps(word, ensure_ascii=False)[1:-1]  # Bash has the same escapes
    return "$'" + escaped.replace("'", r"\'") + "'"
