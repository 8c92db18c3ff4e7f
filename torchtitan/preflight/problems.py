"""What rules between sections find: the key of a wrong value, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator

from torchtitan.config.job_config import JobConfig
from torchtitan.config.load import fail

Problems = Iterator[tuple[str, str]]
"""Pairs of a key and a problem. A rule is not resumed after its first: see `refuse`."""


def refuse(problems: Problems, job_config: JobConfig) -> None:
    """Raise `ConfigError` for the first problem, if there is one."""
    for key, problem in problems:
        fail(job_config, key, problem)
