"""Refuse ranks that were started with different options or packages, or that read other data."""

from __future__ import annotations

import platform
import tomllib
from typing import Any

import torch
import torch.distributed as dist

import torchtitan
from torchtitan.components.run_folder import config_to_keep, flatten, lines_of_differing
from torchtitan.config.job_config import JobConfig
from torchtitan.data import DataLoader
from torchtitan.errors import ConfigError
from torchtitan.runtime.collective_calls import on_all_ranks, on_rank_zero


def refuse_other_options(job_config: JobConfig) -> None:
    """Raise `ConfigError` on all ranks if their configurations or versions differ."""
    facts = flatten(tomllib.loads(config_to_keep(job_config)))
    facts |= {"torchtitan": torchtitan.__version__, "torch": torch.__version__}
    _refuse_other(facts, "Start all ranks with the same file, options and packages")


def refuse_other_data(dataloader: Any) -> None:
    """Raise `ConfigError` on all ranks if their sources differ.

    A loader of a model's own is not checked: it may describe a different part on each rank.
    """
    described = dataloader.describe() if isinstance(dataloader, DataLoader) else {}
    facts = {
        f"{source['name'] or 'training.dataset'}: {key}": value
        for source in described.get("sources", [])
        for key, value in source.items()
    }
    _refuse_other(facts, "All ranks must read the same files in the same order")


def _refuse_other(facts: dict[str, Any], way_out: str) -> None:
    host = platform.node()
    first, first_host = on_rank_zero(lambda: (facts, host), dist.group.WORLD)

    def compare(rank: int, ranks: int) -> None:
        if lines := lines_of_differing(facts, first, "on rank 0"):
            raise ConfigError(
                f"rank {rank} (host {host}) differs from rank 0 (host {first_host}):"
                f"{lines}\n{way_out}"
            )

    on_all_ranks(compare, dist.group.WORLD)
