"""`torchtitan checkpoint`: list, verify, prune, compare and average checkpoints."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from torchtitan.components.checkpoint.storage import local_path
from torchtitan.config.options import parse_action, require_at_least_one, shown_as
from torchtitan.errors import ConfigError
from torchtitan.tools.text import human_bytes

from .average import average
from .diff import diff
from .listing import prune, show, verify

DESCRIPTION = "List, verify, prune, compare and average checkpoints. A PATH may be a URL."


@dataclass
class List:
    """List a run's checkpoints: step, time, size, state."""

    path: Annotated[tyro.conf.Positional[str], shown_as("PATH")]
    """A run's folder, or that of its checkpoints."""


@dataclass
class Verify:
    """Read all files and compare their checksums."""

    paths: Annotated[tyro.conf.Positional[list[str]], shown_as("PATH [PATH ...]")]
    """A checkpoint, or a folder of checkpoints."""


@dataclass
class Prune:
    """Delete all resumable checkpoints but the newest K."""

    path: Annotated[tyro.conf.Positional[str], shown_as("PATH")]
    """A run's folder, or that of its checkpoints."""
    keep: Annotated[int, shown_as("K")]
    """Number to keep."""
    keep_every: Annotated[int, shown_as("N")] = 0
    """Also keep those of every N steps."""
    keep_steps: Annotated[list[int], shown_as("[STEP ...]")] = field(default_factory=list)
    """Also keep those of these steps."""
    dry_run: bool = False
    """Only show what would be deleted."""


@dataclass
class Diff:
    """Compare two checkpoints, or two Hugging Face folders."""

    first: Annotated[tyro.conf.Positional[str], shown_as("A")]
    """A step-N or a Hugging Face folder."""
    second: Annotated[tyro.conf.Positional[str], shown_as("B")]
    """The other."""


@dataclass
class Average:
    """Make a checkpoint of the mean of weights."""

    paths: Annotated[tyro.conf.Positional[list[str]], shown_as("PATH PATH [PATH ...]")]
    """Checkpoints of one model."""
    out: Annotated[str, shown_as("OUT")]
    """Folder to make."""


ACTIONS = {"list": List, "verify": Verify, "prune": Prune, "diff": Diff, "average": Average}


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan checkpoint`; return the exit code.

    It is 0, or 1 if `verify` finds damage or `diff` a difference.
    """
    options = parse_action(ACTIONS, argv, "torchtitan checkpoint", DESCRIPTION)
    match options:
        case List(path):
            show(path)
        case Verify(paths):
            if not paths:
                raise ConfigError("give a checkpoint: torchtitan checkpoint verify PATH [PATH ...]")
            return verify(paths)
        case Prune(path, keep, keep_every, keep_steps, dry_run):
            require_at_least_one(options, "keep")
            if keep_every < 0:
                raise ConfigError(f"--keep-every {keep_every}: must be 0 or more")
            if negative := [step for step in keep_steps if step < 0]:
                raise ConfigError(f"--keep-steps {negative[0]}: must be 0 or more")
            prune(path, keep, keep_every, keep_steps, dry_run)
        case Diff(first, second):
            return diff(first, second)
        case Average(paths, out):
            if len(paths) < 2:
                raise ConfigError("give two checkpoints or more, whose weights are averaged")
            folder = local_path(out)
            size = human_bytes(average(paths, folder).nbytes)
            sys.stdout.write(f"{folder}: the mean of {len(paths)} checkpoints, {size}\n")
    return 0
