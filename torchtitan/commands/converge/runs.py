"""Plans the runs of a comparison: training jobs to start, and folders of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from torchtitan.components.run_folder import CONFIG_FILE, METRICS_FILE
from torchtitan.config import JobConfig, load_config
from torchtitan.config.batch import batch_sizes
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError, did_you_mean
from torchtitan.models.plugins import load_plugins
from torchtitan.preflight.validate import validate
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.runtime.device import device_type
from torchtitan.tools.foreign_files import is_file, is_folder

from .curves import read_tokens, read_world_size

FORCED = {
    "metrics.log_freq": "1",
    "metrics.progress": "plain",  # the output goes to a file
    "checkpoint.enable": "false",  # otherwise an earlier comparison in this folder would be resumed
    "checkpoint.load_step": "-1",
    "checkpoint.initial_load_model_only": "true",  # all curves begin at step 1
    "checkpoint.last_save_in_hf": "false",
    "job.print_config": "false",
}
"""Options of every job, which override its file."""


@dataclass
class Run:
    """One training job of a comparison."""

    name: str
    """Unique; used in tables and plots."""
    argument: str
    """The file or folder, as the user wrote it."""
    folder: Path
    """Folder of its outputs."""
    config: JobConfig
    processes: int | None
    """None: a finished run whose metrics do not show it."""
    global_batch_size: int
    """Sequences in an optimizer step, -1 resolved."""
    options: list[str] = field(default_factory=list)
    """Command line of `torchtitan.train`; empty for a finished run."""

    @property
    def finished(self) -> bool:
        return not self.options

    @property
    def layout(self) -> str:
        """`dp_shard 2, tp 2`."""
        if self.processes is None:
            return "unknown"
        return str(ParallelDims.from_config(self.config.parallelism, self.processes))


def plan_runs(
    arguments: Sequence[str], out: Path, nproc: Sequence[str], overrides: Sequence[str]
) -> list[Run]:
    """Read and check everything before anything is started.

    Args:
        arguments: each a TOML file, or the folder of a finished run.
        out: folder for the new runs; each gets `out/NAME`.
        nproc: `NAME=N` each; other runs get the smallest world that their degrees allow.
        overrides: options of `torchtitan train` that go to every job.
    """
    names = unique_names(arguments)
    counts = _parse_nproc(nproc, names, arguments)
    _refuse_own_options(overrides)
    runs = []
    for name, argument in zip(names, arguments, strict=True):
        if is_folder(Path(argument), ConfigError):
            if name in counts:
                raise ConfigError(f"--nproc {name}={counts[name]}: {argument} is a finished run")
            runs.append(open_run(name, argument))
        elif is_file(Path(argument), ConfigError):
            runs.append(_plan_run(name, argument, out / name, counts.get(name), overrides))
        else:
            raise ConfigError(f"{argument}: no such file or folder. Give TOML files or run folders")
    finished = [run.folder.resolve() for run in runs if run.finished]
    for run in runs:
        if not run.finished and run.folder.resolve() in finished:
            raise ConfigError(
                f"{run.argument} would overwrite the finished run {run.folder}: choose another "
                "--out"
            )
    if overrides and all(run.finished for run in runs):
        raise ConfigError(
            f"{overrides[0]}: options after -- need a run to start, but all runs are finished"
        )
    return runs


def unique_names(arguments: Sequence[str]) -> list[str]:
    """Return files' names without `.toml`, and folders' names; a second equal name gets `-2`."""
    names: list[str] = []
    for argument in arguments:
        path = Path(argument).resolve()
        name = base = path.name.removesuffix(".toml")
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def open_run(name: str, argument: str) -> Run:
    """Open a finished run by its `config.resolved.toml` and `metrics.jsonl`.

    Raises:
        ConfigError: a file is missing or wrong, or not every step was logged.
    """
    folder = Path(argument)
    for file in (CONFIG_FILE, METRICS_FILE):
        if not is_file(folder / file, ConfigError):
            raise ConfigError(f"{argument}: not the folder of a run: it has no {file}")
    path = folder / CONFIG_FILE
    config = load_config(["--job.config_file", str(path)])
    if config.metrics.log_freq != 1:
        raise ConfigError(
            f"{path}: [metrics] log_freq = {config.metrics.log_freq}: only a run that logged every "
            "step can be compared. Run it again with --metrics.log_freq 1"
        )
    processes = read_world_size(folder)
    global_batch_size = config.training.global_batch_size
    if global_batch_size == -1:
        steps, tokens = read_tokens(folder)
        global_batch_size = tokens // (steps * config.training.seq_len)
    return Run(name, argument, folder, config, processes, global_batch_size)


def _plan_run(
    name: str, argument: str, folder: Path, processes: int | None, overrides: Sequence[str]
) -> Run:
    options = [*overrides, f"--job.config_file={argument}", f"--job.dump_folder={folder}"]
    options += [f"--{key}={value}" for key, value in FORCED.items()]
    config = load_config(options)
    # Without checkpoints a rollback is a skip.
    guards = ("on_nonfinite", "on_spike")
    rollbacks = [name for name in guards if getattr(config.training, name) == "rollback"]
    if rollbacks:
        options += [f"--training.{name}=skip" for name in rollbacks]
        config = load_config(options)
    processes = processes or config.parallelism.smallest_world
    if device_type() == "cuda" and processes > torch.cuda.device_count():
        raise ConfigError(
            f"{name} needs {processes} processes, but this machine has "
            f"{torch.cuda.device_count()} GPUs. Compare finished runs instead: give their folders"
        )
    load_plugins(config.job.custom_import)
    train_spec_of(config)
    validate(config, processes)
    dims = ParallelDims.from_config(config.parallelism, processes)
    global_batch_size = batch_sizes(config, dims.dp).largest
    return Run(name, argument, folder, config, processes, global_batch_size, options)


def _parse_nproc(
    nproc: Sequence[str], names: Sequence[str], arguments: Sequence[str]
) -> dict[str, int]:
    """Parse `NAME=N` or `FILE=N`; a file that is given twice gets its number for both."""
    counts: dict[str, int] = {}
    for word in nproc:
        key, _, number = word.rpartition("=")
        if not (key and number.isdecimal() and int(number) > 0):
            raise ConfigError(f"--nproc {word}: must be NAME=N with N at least 1")
        chosen = [n for n, a in zip(names, arguments, strict=True) if key in (n, a)]
        if not chosen:
            raise ConfigError(f"--nproc {word}: no such run.{did_you_mean(key, names)}")
        counts |= dict.fromkeys(chosen, int(number))
    return counts


def _refuse_own_options(overrides: Sequence[str]) -> None:
    reasons = {
        "job.config_file": "files go before --",
        "job.dump_folder": "use --out",
        "metrics.log_freq": "every step is logged",
    }
    for key, reason in reasons.items():
        for word in overrides:
            if word.partition("=")[0] == f"--{key}":
                raise ConfigError(f"{word}: converge sets it: {reason}")
