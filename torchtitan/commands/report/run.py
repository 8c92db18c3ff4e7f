"""Reads a run's dump folder: its logged values, config, environment and checkpoints."""

from __future__ import annotations

import math
import tomllib
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import compress, pairwise
from pathlib import Path
from statistics import median_high
from typing import Any

from torchtitan.components.environment import ENVIRONMENT_FILE
from torchtitan.components.metric_keys import STARTED_AT, VALIDATION
from torchtitan.components.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    VALIDATION_FILE,
    flatten,
    guard_skipped,
    read_rows,
)
from torchtitan.errors import ConfigError, outage_or
from torchtitan.tools.foreign_files import exists, is_file, is_folder, read_json_if_any, read_text
from torchtitan.tools.text import is_url

_TYPES = {
    **dict.fromkeys(("job.description", "model.name", "model.flavor", "checkpoint.folder"), str),
    "training.steps": int,
}
"""Types of keys used by a report. A file of another tool, or a damaged one, may have others."""


@dataclass
class Curve:
    """The values of one key; NaN if a value was not finite."""

    steps: list[int]
    values: Sequence[float]

    @property
    def last(self) -> float:
        return self.values[-1]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


@dataclass
class Run:
    """One run folder."""

    name: str
    """Unique among the runs of a report."""
    folder: Path
    curves: dict[str, Curve]
    """Key of `metrics.jsonl` -> its values."""
    validation: dict[str, Curve]
    """Key of `validation.jsonl` -> its values."""
    config: dict[str, Any]
    """`training.steps` -> value; empty if the folder has no config."""
    config_text: str
    environment: dict[str, str]
    checkpoints: list[Path]
    """The one saved last is at the end."""
    written: datetime | None
    """Local time at which a step was last logged; None if none was."""

    @property
    def step(self) -> int:
        """Last logged step; 0 if there is none."""
        return max((curve.steps[-1] for curve in self.curves.values()), default=0)

    @property
    def total_steps(self) -> int | None:
        return self.config.get("training.steps")

    def last(self, key: str) -> float | None:
        """The last value of a key; None if it was never logged."""
        curve = self.curves.get(key)
        return curve.last if curve else None

    @property
    def validation_loss(self) -> float | None:
        curve = self.validation.get(VALIDATION.key)
        return curve.last if curve else None

    def greatest(self, key: str) -> float | None:
        """The greatest finite value of a key; None if there is none."""
        return max(self.curves[key].finite, default=None) if key in self.curves else None

    @property
    def seconds(self) -> float | None:
        """Total training time of all processes that took part in succession; None if unknown.

        Each process counts from its own start, so a smaller value belongs to another process, as
        does a value with another start time.
        """
        nothing = Curve([], [])
        elapsed = self.curves.get("elapsed_seconds", nothing)
        starts = self.curves.get(STARTED_AT.key, nothing)
        start_of = dict(zip(starts.steps, starts.values, strict=True))
        points = [
            (value, start_of.get(step))
            for step, value in zip(elapsed.steps, elapsed.values, strict=True)
            if math.isfinite(value)
        ]
        if not points:
            return None
        ends = [
            a for (a, start), (b, next_start) in pairwise(points) if b < a or next_start != start
        ]
        return sum(ends) + points[-1][0]

    @property
    def skipped(self) -> list[int]:
        """Logged steps at which the guard had skipped more steps than at the one before."""
        curve = self.curves.get("steps_skipped", Curve([], []))
        return list(compress(curve.steps, guard_skipped(curve.values)))

    def median(self, key: str) -> float | None:
        """The upper median of a key's finite values."""
        values = self.curves[key].finite if key in self.curves else []
        return median_high(values) if values else None


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Read run folders; a run may still be writing."""
    return [
        _read_run(name, Path(argument))
        for name, argument in zip(_names(arguments), arguments, strict=True)
    ]


def _names(arguments: Sequence[str]) -> list[str]:
    """Return the ends of the folders' paths that tell them apart; one given again gets `-2`."""
    paths = [Path(argument).resolve().parts for argument in arguments]
    names = []
    for i, path in enumerate(paths):
        same = paths.count(path)
        ends = (path[-length:] for length in range(1, len(path) + 1))
        end = next(end for end in ends if sum(p[-len(end) :] == end for p in paths) == same)
        earlier = paths[:i].count(path)
        names.append(str(Path(*end)) + (f"-{earlier + 1}" if earlier else ""))
    return names


def _read_run(name: str, folder: Path) -> Run:
    from torchtitan.components.checkpoint.folder import list_checkpoints

    _check(folder)
    config_text, config = _read_config(folder / CONFIG_FILE)
    environment = read_json_if_any(folder / ENVIRONMENT_FILE, ConfigError)
    saved_in = config.get("checkpoint.folder", "checkpoint")
    try:
        curves = _curves(read_rows(folder / METRICS_FILE))
        validation = _curves(read_rows(folder / VALIDATION_FILE))
        seconds = (folder / METRICS_FILE).stat().st_mtime if curves else None
        written = None if seconds is None else datetime.fromtimestamp(seconds)
        # Checkpoints behind a URL are not listed: a report needs no network.
        checkpoints = [] if is_url(saved_in) else list_checkpoints(folder / saved_in)
    except (OSError, ValueError) as error:  # ValueError for a path with a NUL
        raise outage_or(ConfigError, f"{folder}: cannot read it: {error}", error) from error
    return Run(
        name,
        folder,
        curves,
        validation,
        config,
        config_text,
        {key: str(value) for key, value in environment.items()},
        checkpoints,
        written,
    )


def _check(folder: Path) -> None:
    if is_file(folder, ConfigError):
        raise ConfigError(f"{folder}: a file. Give the folder of a run (job.dump_folder)")
    if not is_folder(folder, ConfigError):
        raise ConfigError(f"{folder}: no such folder")
    if any(is_file(folder / file, ConfigError) for file in (METRICS_FILE, CONFIG_FILE)):
        return
    below = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS_FILE}"))
    hint = f". Runs in it: {', '.join(below[:5])}" if below else ""
    raise ConfigError(f"{folder}: not the folder of a run: it has no {METRICS_FILE}{hint}")


def _curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    steps: defaultdict[str, list[int]] = defaultdict(list)
    values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))  # a third of a list
    for row in rows:
        step = int(row.pop("step"))
        for key, value in row.items():
            steps[key].append(step)
            # A run writes null for a value that is not finite.
            values[key].append(math.nan if value is None else value)
    return {key: Curve(steps[key], values[key]) for key in steps}


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text and the keys of a run's config; nothing if there is no such file."""
    if not exists(path, ConfigError):
        return "", {}
    text = read_text(path, ConfigError)
    try:
        config = flatten(tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    return text, {k: v for k, v in config.items() if isinstance(v, _TYPES.get(k, object))}
