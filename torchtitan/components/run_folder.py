"""The files that a run leaves in its dump folder, for other commands to read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig, origin, to_toml
from torchtitan.config.toml_file import format_value
from torchtitan.errors import ConfigError, os_errors_as
from torchtitan.tools.foreign_files import is_file, parse_json, read_bytes
from torchtitan.tools.result_file import replace_file
from torchtitan.tools.secrets import hide_secrets

from .environment import ENVIRONMENT_FILE, environment

CONFIG_FILE = "config.resolved.toml"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"

_OF_ONE_RUN = ("job.config_file", "job.dump_folder", "job.description", "job.print_config")
"""Keys that differ between any two runs, or are not saved with a run."""
_OF_TRAINED_STEPS = ("loss", "max_loss", "grad_norm")


def make_dump_folder(job_config: JobConfig) -> None:
    """Create `job.dump_folder`, and test writing there, before a run allocates memory.

    Raises:
        ConfigError: the folder cannot be written; `OutageError`: not now.
    """
    with _writing(job_config) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_description(job_config: JobConfig, processes: int) -> None:
    """Write a description of the run for people and reports: its config and its environment.

    Raises:
        ConfigError: the folder cannot be written; `OutageError`: not now.
    """
    facts = environment() | {"processes": str(processes)}
    with _writing(job_config) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / CONFIG_FILE, config_to_keep(job_config).encode())
        replace_file(folder / ENVIRONMENT_FILE, (json.dumps(facts, indent=1) + "\n").encode())


def config_to_keep(job_config: JobConfig) -> str:
    """Contents of `config.resolved.toml`: URLs in it are without passwords and signatures."""
    return hide_secrets(to_toml(job_config))


@contextmanager
def _writing(job_config: JobConfig) -> Iterator[Path]:
    """Yield the dump folder. Raises `ConfigError` or `OutageError` if it cannot be written."""
    key = origin(job_config, "job.dump_folder")
    with os_errors_as(ConfigError, f"{key}: cannot write there"):
        yield Path(job_config.job.dump_folder)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the numbers in `metrics.jsonl` or `validation.jsonl`, by line; none without a file.

    An incomplete last line, due to a kill or because it is just being written, is left out. So are
    values that are null because the guard skipped all steps since the row before: they do not mean
    that something was not finite.

    Raises:
        ConfigError: another line is not a JSON object with a step.
        OutageError: the file cannot be read now.
    """
    if not is_file(path, ConfigError):
        return []
    rows: list[dict[str, Any]] = []
    lines = read_bytes(path, ConfigError).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = {key: value for key, value in parse_json(line).items() if _is_number(value)}
            int(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            if number == len(lines):
                break
            shown = line[:60].decode(errors="replace")
            raise ConfigError(f"{path}:{number}: not a logged step: {shown!r}") from error
        rows.append(row)
    for row in compress(rows, guard_skipped(row.get("steps_skipped") or 0 for row in rows)):
        for key in _OF_TRAINED_STEPS:
            if row.get(key, 0) is None:
                del row[key]
    return rows


def _is_number(value: Any) -> bool:
    """Whether a run can log this value: null, or a number that fits into a float."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**1000)


def guard_skipped(counts: Iterable[float]) -> Iterator[bool]:
    """Return for each row whether the guard skipped more steps since the row before.

    Args:
        counts: `steps_skipped` of the rows, in their order.
    """
    return (count > before for before, count in pairwise([0, *counts]))


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert `{"a": {"b": 1}}` to `{"a.b": 1}`, to any depth."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return key -> its value in each `flatten`ed config, for keys that differ."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in _OF_ONE_RUN)
    values = {key: [shown(config.get(key)) for config in configs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def lines_of_differing(own: dict[str, Any], other: dict[str, Any], where: str) -> str:
    """Return a line for each key of `differing`, such as `debug.seed = 1 (on rank 0: 2)`."""
    found = differing([own, other]).items()
    return "".join(f"\n  {key} = {here} ({where}: {there})" for key, (here, there) in found)


def shown(value: Any) -> str:
    """Format the value of a key as in TOML."""
    return "unset" if value is None else format_value(value)
