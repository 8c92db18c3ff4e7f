"""Runs the command `torchtitan train` and other functions on ranks forked from a warm server.

See `torchtitan.runtime.ranks`: a run starts in milliseconds instead of the seconds that a new
Python takes to import PyTorch. Everything runs on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch.distributed as dist

from torchtitan import cli
from torchtitan.components.checkpoint.owner import OWNER
from torchtitan.runtime.process_group import init_distributed
from torchtitan.runtime.ranks import Ranks, RanksFailedError

TIMEOUT = 120.0


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """Run `function(*args)` on each of `world_size` new ranks, on the CPU; the results by rank."""
    with Ranks(function, world_size, *args, env=_environment()) as ranks:
        return ranks.wait(timeout)


def on_ranks(world_size: int, function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `function(folder, *args)` on each of `world_size` ranks that have joined by gloo."""
    run_ranks(_join, world_size, function, folder, args)


def _join(function: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    init_distributed(timeout_seconds=60)
    function(folder, *args)
    dist.destroy_process_group()


def train(folder: Path, *options: str, ranks: int = 1, timeout: float = TIMEOUT) -> list[dict]:
    """`torchtitan train` with `options`, into `folder`; the lines of its metrics.jsonl."""
    words = "train", *options, "--job.dump_folder", str(folder)
    done = command(*words, ranks=ranks, timeout=timeout)
    assert done.exit_code == 0, done.err
    return read_lines(folder / "metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints_in(folder: Path) -> list[str]:
    """Names of what is in the folder of checkpoints, but for the file that says whose they are."""
    return sorted(path.name for path in folder.iterdir() if path.name != OWNER)


@dataclass
class Finished:
    """What is left of a command."""

    exit_codes: list[int | None]
    """Of each rank; None for one that had to be stopped."""
    out: str
    """stdout of all ranks, one after the other."""
    err: str
    """The same of stderr."""

    @property
    def exit_code(self) -> int | None:
        """The first that is not 0, else 0."""
        return next((code for code in self.exit_codes if code != 0), 0)


def command(*arguments: str, ranks: int = 1, timeout: float = TIMEOUT, **env: str) -> Finished:
    """`torchtitan ARGUMENTS`; with several ranks as under torchrun, with one without it."""
    with Running(*arguments, ranks=ranks, **env) as running:
        return running.wait(timeout)


class Running:
    """`command`, while it runs. Leaving the `with` block kills it."""

    def __init__(self, *arguments: str, ranks: int = 1, **env: str) -> None:
        self._folder = TemporaryDirectory(prefix="torchtitan-test-")
        self._size = ranks
        self._ranks = Ranks(
            _run_command,
            ranks,
            list(arguments),
            env=_environment() | env,
            output_folder=Path(self._folder.name),
        )
        self.pids = self._ranks.pids

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        exit_codes: list[int | None] = [0] * self._size
        tracebacks = ""
        try:
            self._ranks.wait(timeout)
        except RanksFailedError as error:
            for failure in error.failures:
                exit_codes[failure.rank] = failure.exit_code
                tracebacks += failure.traceback
        return Finished(exit_codes, self._read("out"), self._read("err") + tracebacks)

    def kill(self) -> None:
        """SIGKILL to all ranks at once. `wait`, maybe in another thread, then returns."""
        self._ranks.kill()

    def _read(self, suffix: str) -> str:
        folder = Path(self._folder.name)
        return "".join((folder / f"rank-{i}.{suffix}").read_text() for i in range(self._size))

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ranks.__exit__(*exc_info)
        self._folder.cleanup()


def shell(
    words: list[str], *, cwd: Path | None = None, check: bool = True, timeout: float = TIMEOUT
) -> Finished:
    """A command as a user types it: a new Python, seconds to start.

    The programs (`python`, `torchrun`, `torchtitan`) are those of the running environment.
    """
    program = Path(sysconfig.get_path("scripts"), words[0])
    env = _environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [program, *words[1:]], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stderr
    return Finished([done.returncode], done.stdout, done.stderr)


def train_on_c4(folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A run on data of the Hugging Face hub, by the command as users type it, in `env` alone."""
    config = folder / "config.toml"
    config.write_text(
        '[model]\nname = "llama3"\nflavor = "debugmodel"\n'
        f'[job]\ndump_folder = "{folder}/run"\n[training]\ndataset = "c4"\n'
    )
    command = [sys.executable, "-m", "torchtitan.train", "--job.config_file", str(config)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)


def short_and_long(short: dict[str, Any], long: dict[str, Any]) -> list[Any]:
    """The values as parameters of a test, by their names; those of `long` are for `-m long`."""
    return [
        *(pytest.param(value, id=name) for name, value in short.items()),
        *(pytest.param(value, id=name, marks=pytest.mark.long) for name, value in long.items()),
    ]


def _environment() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def _run_command(arguments: list[str]) -> None:
    if os.environ["WORLD_SIZE"] == "1":
        for name in [name for name in os.environ if _is_of_torchrun(name)]:
            del os.environ[name]
    sys.argv[1:] = arguments
    sys.exit(cli.main(arguments))


def _is_of_torchrun(name: str) -> bool:
    return name.endswith(("RANK", "WORLD_SIZE")) or name.startswith(("MASTER_", "TORCHELASTIC_"))
